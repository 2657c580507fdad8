"""Self-forcing: the model continues its own videos, and the world says how they should have gone on.

Teacher forcing shows the model clean pasts only; its own are never quite clean, and what it does with them adds up over a
long video. So it rolls out videos through the pack's own cache, the position of the shape is read from them, and each chunk
learns to continue what the model had made before it: the right shape in the right colour, from where it is. (The idea of
Self-Forcing, Huang et al. 2025, arXiv:2506.08009, with the renderer in the place of a learned judge; also DAgger, Ross et
al. 2011, arXiv:1011.0686.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.sampling.session import RollingSession

from .code import TIME, LinearCode
from .detector import Sighting, detect
from .starts import FRAMES
from .world import SIDE, STRAIGHT_FRAMES, Scene, centre_of_mass, render

CHUNK_FRAMES = FRAMES * TIME
"""Pixel frames of every chunk but the first."""
LARGEST_MISS = 5.0
"""Pixels between where the shape is seen and where it should be; beyond, the video is lost and teaches nothing."""


class Rollout(NamedTuple):
    """own [B, 16, F, 8, 8]: what the model made. right: the same shape, how each chunk should have continued the chunks
    before it. usable [B, chunks]: whether that is known; never in the first chunk."""

    own: torch.Tensor
    right: torch.Tensor
    usable: torch.Tensor
    scenes: list[Scene]


class Track:
    """Where the shapes of B videos are: straight lines from `start` [B, 2], folded back at the walls."""

    def __init__(self, scenes: list[Scene]):
        self.velocity = torch.tensor([scene.velocity for scene in scenes])
        margin = torch.tensor([scene.margin for scene in scenes])[:, None]
        self.low, self.span = margin, SIDE - 2 * margin
        self.start = torch.full_like(self.velocity, SIDE / 2)
        self.bias = torch.tensor([centre_of_mass(scene) for scene in scenes])

    def _free(self, times: torch.Tensor) -> torch.Tensor:
        return self.start[:, None] + times[:, None] * self.velocity[:, None] - self.low[:, None]

    def at(self, times: torch.Tensor) -> torch.Tensor:
        """Positions [B, T, 2] at the frame numbers `times` [T]."""
        span = self.span[:, None]
        return self.low[:, None] + span - (self._free(times).remainder(2 * span) - span).abs()

    def fit(self, seen: list[Sighting], times: torch.Tensor, bounces: bool = True) -> torch.Tensor:
        """Move the lines to where the shapes are seen at `times`; [B] bool: they are there and move as they should."""
        span = self.span[:, None]
        position = torch.stack([sighting.position for sighting in seen]) - self.bias[:, None]
        if not bounces:
            self.start = (position - times[:, None] * self.velocity[:, None]).mean(1)
        sign = torch.where(self._free(times).remainder(2 * span) < span, 1.0, -1.0)
        miss = position - self.at(times)
        self.start = self.start + (sign * miss).mean(1)
        there = torch.stack([sighting.present.all() for sighting in seen])
        return there & (miss.norm(dim=2).amax(1) < LARGEST_MISS)


def pixel_times(chunk: int) -> torch.Tensor:
    """Frame numbers of a chunk's pixel frames."""
    first = STRAIGHT_FRAMES + CHUNK_FRAMES * (chunk - 1)
    return torch.arange(STRAIGHT_FRAMES) if chunk == 0 else torch.arange(first, first + CHUNK_FRAMES)


def roll_out(
    model: CausalModel,
    prompt: torch.Tensor,
    scenes: list[Scene],
    code: LinearCode,
    scale: float,
    chunks: int,
    seed: int,
) -> Rollout:
    """Sample videos of `scenes` with the prompts' embeddings [B, L, D], and say how each chunk should have gone on."""
    with RollingSession(model, prompt, height=SIDE, width=SIDE, batch=len(scenes)) as session:
        own = torch.cat([chunk.latents for chunk in session.generate(chunks, seed=seed)], 2)
    frames = code.decode(own / scale)
    track, right = Track(scenes), own.clone()
    usable = torch.zeros(len(scenes), chunks, dtype=torch.bool)
    known = torch.ones(len(scenes), dtype=torch.bool)
    for chunk in range(chunks):
        times = pixel_times(chunk)
        if chunk:
            usable[:, chunk] = known
            right[:, :, chunk * FRAMES :][:, :, :FRAMES] = scale * code.encode(render(scenes, track.at(times)))
        seen = [detect(video[:, times]) for video in frames]
        known = known & track.fit(seen, times, bounces=chunk > 0)
    return Rollout(own, right, usable, scenes)
