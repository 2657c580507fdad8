"""First chunks. Nothing comes before them, so their prompt and their noise must say everything, also where the shape starts.

A prompt leaves the start open. A model that learns the mean over all starts paints a smear at the highest noise level, and
four steps are too few to turn it into a shape. So the noise decides: the mean of the pure noise in one channel is the column,
that in another the row. Then the first step, too, has one right answer, a sharp one; and different seeds start at different
places. (A fixed coupling of noise and data, as in rectified flow, Liu et al. 2022, arXiv:2209.03003.) The other levels need
no coupling: with SCALE the shape can be seen in their noise.
"""

from __future__ import annotations

import torch

from .code import LinearCode
from .world import STRAIGHT_FRAMES, Scene, render, starting_range, trajectory

FRAMES = 3
"""Latent frames of a chunk; the first chunk has STRAIGHT_FRAMES pixel frames."""


def chosen_start(noise: torch.Tensor, spread: float = 1.0) -> torch.Tensor:
    """Where pure noise [B, 16, 3, h, w] starts the shape: [B, 2] (x, y), 0..1 of what is possible, uniform.

    spread: below 1 the starts lie nearer to the middle.
    """
    mean = noise[:, :2].flatten(2).mean(2)
    return 0.5 + spread * (torch.special.ndtr(mean * noise[0, 0].numel() ** 0.5) - 0.5)


def first_chunks(code: LinearCode, scenes: list[Scene], fractions: torch.Tensor) -> torch.Tensor:
    """Codes [B, 16, 3, 8, 8] of the videos' first chunks, starting at `fractions` [B, 2] of what is possible."""
    paths = []
    for scene, (across, down) in zip(scenes, fractions.tolist()):
        (left, right), (top, bottom) = starting_range(scene)
        start = left + (right - left) * across, top + (bottom - top) * down
        paths.append(trajectory(scene, start, STRAIGHT_FRAMES))
    return code.encode(render(scenes, torch.stack(paths)))
