"""First chunks. Nothing comes before them, so their prompt and their noise must say everything, also where the shape starts.

A prompt leaves the start open. A model that learns the mean over all starts paints a smear at the highest noise level, and
four steps are too few to turn it into a shape. So the noise decides: the mean of the pure noise in one channel is the column,
that in another the row. Then the first step, too, has one right answer, a sharp one; and different seeds start at different
places. (A fixed coupling of noise and data, as in rectified flow, Liu et al. 2022, arXiv:2209.03003.) The other levels need
no coupling: with SCALE the shape can be seen in their noise. What else a prompt leaves open is always the same, see OPEN.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .code import LinearCode
from .world import (
    COLOURS,
    SMALLER,
    STRAIGHT_FRAMES,
    Scene,
    backdrop,
    covered,
    moved,
    other_shapes,
    starting_range,
    trajectory,
)

FRAMES = 3
"""Latent frames of a chunk; the first chunk has STRAIGHT_FRAMES pixel frames."""
PLACE = slice(0, 2)
"""Channels of the noise whose means decide where the shape starts."""
OPEN = {"shape": "circle", "colour": "green", "size": "big", "direction": "right"}
"""What a prompt shows that says none of these."""


def drawn_place(noise: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers [B, 2] (x, y) from pure noise [B, 16, 3, h, w]."""
    return noise[:, PLACE].flatten(2).mean(2) * noise[0, 0].numel() ** 0.5


def chosen_start(noise: torch.Tensor, spread: float = 1.0) -> torch.Tensor:
    """Where pure noise [B, 16, 3, h, w] starts the shape: [B, 2] (x, y), 0..1 of what is possible, uniform.

    spread: below 1 the starts lie nearer to the middle.
    """
    return 0.5 + spread * (torch.special.ndtr(drawn_place(noise)) - 0.5)


def settled(scene: Scene, said: frozenset[str], looks: dict[str, str]) -> Scene:
    """What a first chunk shows when its prompt says so much of `scene`: the rest is as in `looks`, or else moves, on black."""
    usual = {"speed": "", "background": "black"}
    return replace(scene, **{name: value for name, value in (looks | usual).items() if name not in said})


def first_paths(scenes: list[Scene], fractions: torch.Tensor) -> torch.Tensor:
    """Positions [B, 9, 2] in the videos' first chunks, starting at `fractions` [B, 2] of what is possible."""
    paths = []
    for scene, (across, down) in zip(scenes, fractions.tolist()):
        (left, right), (top, bottom) = starting_range(scene)
        start = left + (right - left) * across, top + (bottom - top) * down
        paths.append(trajectory(scene, start, STRAIGHT_FRAMES))
    return torch.stack(paths)


def drawn(
    code: LinearCode, scenes: list[Scene], paths: torch.Tensor, further: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [B, 16, t, 8, 8] of `scenes` along `paths` [B, T, 2], and the ways [W, B, 16, t, 8, 8] from there to the same
    with the other two shapes, to the same SMALLER, and to the same `moved`; further: in place too, not only in speed."""
    batch, frames = paths.shape[:2]
    shapes = [[scene.shape for scene in scenes], *zip(*(other_shapes(scene.shape) for scene in scenes))]
    sizes = [scene.size for scene in scenes] * len(shapes)
    inside = covered(sum(map(list, shapes), []), sizes, paths.repeat(len(shapes), 1, 1)).unflatten(0, (-1, batch))
    smaller = covered(shapes[0], sizes[:batch], paths, SMALLER)
    ways = moved(inside[0], frames)
    inside = torch.cat([inside, smaller[None], inside[0] + (ways if further else ways[:2])])
    motions = code.cover(inside.flatten(0, 1))
    length, copies = motions.shape[3], len(inside)
    fronts = torch.tensor([COLOURS[scene.colour] for scene in scenes])[:, None].expand(-1, length, -1) / 127.5 - 1
    backs = backdrop(scenes)[:, None].expand(-1, length, -1, -1)
    codes = code.paint(motions, fronts.repeat(copies, 1, 1), backs.repeat(copies, 1, 1, 1)).unflatten(0, (-1, batch))
    return codes[0], codes[1:] - codes[0]
