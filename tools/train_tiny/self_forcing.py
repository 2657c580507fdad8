"""Self-forcing: the model continues its own videos, and the world says how they should have gone on.

Teacher forcing shows the model clean pasts only; its own are never quite clean, and what it does with them adds up over a
long video. So it rolls out videos through the pack's own cache, the position of the shape is read from them, and each chunk
learns to continue what the model had made before it: the right shape in the right colour, from where it is. (The idea of
Self-Forcing, Huang et al. 2025, arXiv:2506.08009, with the renderer in the place of a learned judge; also DAgger, Ross et
al. 2011, arXiv:1011.0686.)
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mode
from typing import NamedTuple

import torch

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.sampling.session import RollingSession

from .code import TIME, LinearCode
from .detector import Sighting, detect, direction
from .pool import STILL, changed
from .prompts import describe
from .starts import FRAMES, OPEN, drawn, settled
from .world import (
    SIDE,
    SIZES,
    STRAIGHT_FRAMES,
    Scene,
    Track,
    centre_of_mass,
    chance,
    latent_places,
    look_numbers,
    random_scene,
)

CHUNK_FRAMES = FRAMES * TIME
"""Pixel frames of every chunk but the first."""
LARGEST_MISS = 9.0
"""Pixels between where the shape is seen and where it should be; beyond, the video is lost and teaches nothing."""
SHRUNKEN = 0.15
"""Share of a small square's area from which on something is a shape that has shrunk: it should grow again, where it is. With half
of it, a triangle that had lost a third counted as gone, and was to be in the middle."""
HOLD = 0.5
"""How far a shape that stands still and was seen elsewhere should go back: it must not follow its own errors."""
CHANGED = 0.6
"""Share of the videos that another prompt changes."""


class Story(NamedTuple):
    """Two prompts of a video: what the first says, and what the second makes of the scene."""

    scene: Scene
    said: frozenset[str]
    then: Scene
    must: frozenset[str]
    prompts: tuple[str, str]


class Rollout(NamedTuple):
    """own [B, 16, F, 8, 8]: what the model made. right: the same shape, how each chunk should have continued the chunks
    before it. ways [7, B, 16, F, 8, 8]: as `drawn` has them. looks [B, chunks, 4], places [B, F, 2]: of
    what `right` shows. usable [B, chunks]: whether that is known; never in the first chunk. second [chunks]: whether a chunk
    follows the second of the prompts."""

    own: torch.Tensor
    right: torch.Tensor
    ways: torch.Tensor
    looks: torch.Tensor
    places: torch.Tensor
    usable: torch.Tensor
    prompts: list[tuple[str, str]]
    second: torch.Tensor


def random_story(generator: torch.Generator) -> Story:
    scene = random_scene(generator, still=STILL)
    prompt, said = describe(scene, generator)
    scene = settled(scene, said, {})
    if chance(generator) > CHANGED:
        return Story(scene, said, scene, frozenset(), (prompt, prompt))
    then, must = changed(scene, generator, frozenset({"shape", "speed", "colour", "background"}))
    # The second prompt cannot say what the first has left to the noise.
    return Story(scene, said, then, must, (prompt, describe(then, generator, must, must | said)[0]))


def sighted(scene: Scene, said: frozenset[str], seen: Sighting) -> Scene:
    """What a first chunk shows, whose prompt says so much of `scene`: the rest is as it is seen, if anything is."""
    if not seen.present.any():
        return settled(scene, said, OPEN)
    size, way = float(seen.size.median()), direction(seen.position)
    looks = {"shape": mode(seen.shape), "colour": mode(seen.colour), "direction": way or scene.direction}
    return settled(scene, said, looks | {"size": min(SIZES, key=lambda name: abs(SIZES[name] - size))})


def follow(
    track: Track, seen: list[Sighting], times: torch.Tensor, bounces: bool = True, hold: float = 0.0
) -> torch.Tensor:
    """Move the lines to where the shapes are seen at `times`, or for the share `hold` of the way not where they should stand
    still; [B] bool: where they are seen they move as they should.

    Some frames that show it are enough: a shape that fades should come back. Where none does it should be in the middle: a
    video that has become empty learns what to do then.
    """
    span = track.span[:, None]
    bias = torch.tensor([centre_of_mass(scene) for scene in track.scenes])
    position = torch.stack([sighting.position for sighting in seen]) - bias[:, None]
    present = torch.stack([sighting.present for sighting in seen])

    def where_seen(values: torch.Tensor) -> torch.Tensor:
        return (values * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp_min(1)

    if not bounces:
        track.start = where_seen(position - times[:, None] * track.velocity[:, None])
    sign = torch.where(track.free(times).remainder(2 * span) < span, 1.0, -1.0)
    miss = position - track.at(times)
    still = torch.tensor([scene.speed == "still" for scene in track.scenes])[:, None]
    track.start = track.start + where_seen(sign * miss) * torch.where(still, 1 - hold, 1.0)
    empty = ~present.any(1, keepdim=True)
    track.start = torch.where(empty, SIDE / 2 - times.float().mean() * track.velocity, track.start)
    return (miss.norm(dim=2) * present).amax(1) < LARGEST_MISS


def pixel_times(chunk: int) -> torch.Tensor:
    """Frame numbers of a chunk's pixel frames."""
    first = STRAIGHT_FRAMES + CHUNK_FRAMES * (chunk - 1)
    return torch.arange(STRAIGHT_FRAMES) if chunk == 0 else torch.arange(first, first + CHUNK_FRAMES)


def roll_out(
    model: CausalModel,
    prompts: tuple[torch.Tensor, torch.Tensor],
    stories: list[Story],
    code: LinearCode,
    scale: float,
    chunks: int,
    seed: int,
) -> Rollout:
    """Sample videos of `stories` with the two prompts' embeddings [B, L, D], half of the chunks each, and say how each
    chunk should have gone on."""
    first, turn = [], chunks // 2
    with RollingSession(model, prompts[0], height=SIDE, width=SIDE, batch=len(stories)) as session:
        first = [chunk.latents for chunk in session.generate(turn, seed=seed)]
        session.set_prompt(prompts[1])
        own = torch.cat(first + [chunk.latents for chunk in session.generate(chunks - turn, seed=seed)], 2)
    frames, right, ways = code.decode(own / scale), own.clone(), torch.zeros(7, *own.shape)
    seen = [detect(video[:, pixel_times(0)], SHRUNKEN) for video in frames]
    scenes = [sighted(story.scene, story.said, sighting) for story, sighting in zip(stories, seen)]
    track = Track(scenes)
    known = follow(track, seen, pixel_times(0), bounces=False)
    usable = torch.zeros(len(scenes), chunks, dtype=torch.bool)
    looks, places = torch.zeros(len(scenes), chunks, 4, dtype=torch.long), torch.zeros(len(scenes), own.shape[2], 2)
    for chunk in range(1, chunks):
        times = pixel_times(chunk)
        if chunk == turn:
            scenes = [
                replace(scene, **{name: getattr(story.then, name) for name in story.must})
                for scene, story in zip(scenes, stories)
            ]
            track.turn(scenes, float(times[0] - 1))
        usable[:, chunk] = known
        part = slice(chunk * FRAMES, (chunk + 1) * FRAMES)
        clean, others = drawn(code, scenes, track.at(times))
        looks[:, chunk] = torch.stack([look_numbers(scene) for scene in scenes])
        places[:, part] = latent_places(track.at(times))
        right[:, :, part], ways[:, :, :, part] = scale * clean, scale * others
        known = known & follow(track, [detect(video[:, times], SHRUNKEN) for video in frames], times, hold=HOLD)
    return Rollout(
        own, right, ways, looks, places, usable, [story.prompts for story in stories], torch.arange(chunks) >= turn
    )
