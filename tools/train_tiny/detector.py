"""Reads the pixels of a video of the tiny world: where the shape is, and of what colour, shape and size, in every frame."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .world import COLOURS, DIRECTIONS, SHAPES, SIDE, SIZES, coverage

SMALLEST_CONTRAST = 0.25
"""Distance of the shape's colour from the background, in [-1, 1] per channel, below which there is no shape."""

UNITS = {"circle": torch.pi, "square": 1.8**2, "triangle": 27**0.5 * 0.65**2}
"""Areas of shapes of size 1."""


class Sighting(NamedTuple):
    """What is seen in T frames. present [T] bool; position [T, 2] (x, y) in pixels, the centre of mass; area [T] in pixels;
    size [T]: half of the width, about, that such a shape of this area has; colour, shape: T names; background [T, 3] in
    [-1, 1]; mismatch [T]: how much of the area is not as in the ideal shape, 0..1."""

    present: torch.Tensor
    position: torch.Tensor
    area: torch.Tensor
    size: torch.Tensor
    colour: list[str]
    shape: list[str]
    background: torch.Tensor
    mismatch: torch.Tensor


def detect(frames: torch.Tensor, least: float = 0.5) -> Sighting:
    """Find the shape in frames [3, T, 64, 64] in [-1, 1]. least: how much of a small square's area counts as a shape."""
    pixels = frames.permute(1, 2, 3, 0).flatten(1, 2)  # [T, 4096, 3]
    background = pixels.median(1).values
    away = pixels - background[:, None]
    distance = away.norm(dim=2)
    # The colour is the mean of the pixels that differ most; the shape covers more than this many.
    strongest = distance.topk(40, dim=1)
    contrast = strongest.values.mean(1)
    front = torch.gather(pixels, 1, strongest.indices[..., None].expand(-1, -1, 3)).mean(1)
    toward = front - background
    inside = ((away * toward[:, None]).sum(2) / toward.square().sum(1).clamp_min(1e-6)[:, None]).clamp(0, 1)
    inside = torch.where(inside < 0.06, 0.0, inside)
    area = inside.sum(1)
    axis = torch.arange(SIDE) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)  # (x, y) of each pixel
    position = inside @ grid / area.clamp_min(1e-6)[:, None]
    sizes = torch.tensor([3.0 * size**2 for size in SIZES.values()])
    present = (contrast > SMALLEST_CONTRAST * 3**0.5) & (area > least * sizes.min()) & (area < 1.7 * sizes.max())
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    colours = torch.cdist(front, palette).argmin(1)
    mismatch, shapes = torch.stack([_mismatch(shape, inside, position, area) for shape in SHAPES], 1).min(1)
    shape = [SHAPES[i] for i in shapes]
    size = (area / torch.tensor([UNITS[name] for name in shape])).sqrt()
    colour = [list(COLOURS)[i] for i in colours]
    return Sighting(present, position, area, size, colour, shape, background, mismatch / area.clamp_min(1.0))


def _mismatch(shape: str, inside: torch.Tensor, position: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Squared difference [T] of the seen coverage [T, 4096] from an ideal shape with the same area and centre of mass."""
    size = (area / UNITS[shape]).sqrt().view(-1, 1, 1)
    axis = torch.arange(SIDE) + 0.5
    x = axis.view(1, 1, -1) - position[:, 0].view(-1, 1, 1)
    y = axis.view(1, -1, 1) - position[:, 1].view(-1, 1, 1)
    if shape == "triangle":
        y = y + 0.5 * 0.65 * size  # its centre of mass lies below the middle of its box
    return (coverage(shape, size, x, y).flatten(1) - inside).square().sum(1)


def prediction_errors(position: torch.Tensor) -> torch.Tensor:
    """How far each position is from where the two before it point, in pixels: [T - 2], the first for frame 2."""
    return (position[2:] - 2 * position[1:-1] + position[:-2]).norm(dim=1)


def direction(position: torch.Tensor) -> str:
    """The named direction that the way from the first to the last position is nearest to; "" when it hardly moves."""
    way = position[-1] - position[0]
    if way.norm() < 1.5:
        return ""
    names = list(DIRECTIONS)
    return names[int((torch.tensor([DIRECTIONS[name] for name in names]) @ way).argmax())]
