"""Numbers from what the detector sees in the frames of a video."""

from __future__ import annotations

from statistics import mean, median

import torch

from rolling_kv.geometry import WAN_21

from ..train_tiny.detector import Sighting
from ..train_tiny.world import SIDE, SPEEDS, Scene, centre_of_mass

LATENT = WAN_21.temporal
"""Pixel frames of a latent frame: over so many the decoder spreads what happens between two."""


def coloured(seen: Sighting, colour: str) -> list[bool]:
    """For each frame, whether there is a shape of that colour."""
    return [bool(there) and name == colour for there, name in zip(seen.present, seen.colour)]


def shaped(seen: Sighting, shape: str) -> list[bool]:
    """For each frame, whether that shape is there."""
    return [bool(there) and name == shape for there, name in zip(seen.present, seen.shape)]


def frames_until(right: list[bool]) -> int | None:
    """Frames before the first that is right and begins a rest of which nine in ten are; None where there is none."""
    for index, good in enumerate(right):
        if good and mean(right[index:]) >= 0.9:
            return index
    return None


def jump(position: torch.Tensor, border: int, scene: Scene) -> float:
    """How far the shape is, in pixels, from where it would have gone by itself, one latent frame after the border.

    position: [T, 2] of the centre of mass. border: the first frame of the chunk. Which way the shape goes is read from the
    last two frames before it, how fast is up to the prompt, and walls turn it around.
    """
    last = border - 1
    velocity = torch.tensor(scene.velocity).abs() * (position[last] - position[last - 1]).sign()
    offset = torch.tensor(centre_of_mass(scene))
    low, high = scene.margin, SIDE - scene.margin
    span = high - low
    free = position[last] + LATENT * velocity - offset - low
    expected = low + span - (free.remainder(2 * span) - span).abs() + offset
    return float((position[last + LATENT] - expected).norm())


def stretch(seen: Sighting, scene: Scene) -> dict[str, float]:
    """What a piece of a video shows: shares of its frames, and medians over them.

    colour, shape: share of the frames that are as the prompt says. brightness: of the background, 0 to 255. size: area in
    pixels. speed: pixels per frame as a share of the prompt's.
    """
    right = coloured(seen, scene.colour)
    steps = (seen.position[1:] - seen.position[:-1]).norm(dim=1)
    return {
        "colour": mean(right),
        "shape": mean(shaped(seen, scene.shape)),
        "brightness": float((seen.background.mean(1) + 1).median() * 127.5),
        "size": float(seen.area.median()),
        "speed": float(steps.median()) / SPEEDS[scene.speed],
    }


def drift(stretches: list[dict[str, float]], name: str) -> float:
    """How much a value has changed from the first fifth of the video to the last, by their means."""
    first, last = fifths([piece[name] for piece in stretches])
    return mean(last) - mean(first)


def fifths(values: list) -> tuple[list, list]:
    """The first fifth of a list and its last."""
    part = max(len(values) // 5, 1)
    return values[:part], values[-part:]


def long_figures(videos: list[list[dict[str, float]]]) -> dict[str, float]:
    """Over all videos: shares of the frames, and medians of the drifts. size is in per cent of that of the first fifth."""
    pieces = [piece for video in videos for piece in video]
    growth = [100 * drift(video, "size") / mean(piece["size"] for piece in fifths(video)[0]) for video in videos]
    return {
        "colour": mean(piece["colour"] for piece in pieces),
        "shape": mean(piece["shape"] for piece in pieces),
        "last": mean(piece["colour"] for video in videos for piece in fifths(video)[1]),
        "speed": median(piece["speed"] for piece in pieces),
        "brightness": median(drift(video, "brightness") for video in videos),
        "size": median(growth),
    }


def switch_figures(runs: list[dict], scenes: list[Scene], border: int, chunk: int) -> dict[str, float | None]:
    """Over all runs of a rule: how soon the new colour is there, and how the shape goes on.

    runs: the records, each of the video of one of the scenes. border, chunk: the first pixel frame after the switch, and
    pixel frames of a chunk.
    """
    frames = [frames_until(run["colour"][border:]) for run in runs]
    switched = [count for count in frames if count is not None]
    jumps, later = (
        [jump(torch.tensor(run["position"]), at, scene) for run, scene in zip(runs, scenes)]
        for at in (border, border + chunk)
    )
    return {
        "videos": len(runs),
        "frames": median(switched) if switched else None,
        "slowest": max(switched, default=None),
        "never": frames.count(None),
        "colour": round(mean(good for run in runs for good in run["colour"][border:]), 3),
        "shape": round(mean(good for run in runs for good in run["shape"][border:]), 3),
        "jump": round(median(jumps), 2),
        "farthest": round(max(jumps), 1),
        "later": round(median(later), 2),
        "passes": runs[0]["passes"],
    }
