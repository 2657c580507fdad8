"""The world of the tiny model: one shape that glides over a plain background and bounces off the walls.

Frames are 64x64 RGB in [-1, 1] at 16 fps. Positions and lengths are in pixels, speeds in pixels per frame. The prompt
names everything but the starting position; it says where the shape moves *first*, because a wall turns it around.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SIDE = 64
COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 190, 75),
    "blue": (50, 90, 235),
    "yellow": (245, 210, 50),
    "purple": (190, 60, 215),
    "cyan": (50, 205, 225),
}
BACKGROUNDS = {"black": (18, 18, 24), "grey": (112, 112, 118), "white": (238, 236, 230)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 6.5, "": 8.5, "big": 11.0}
"""Half of the width, about, in pixels."""
SPEEDS = {"slowly": 0.7, "": 1.2, "quickly": 1.9}
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up and left": (-(0.5**0.5), -(0.5**0.5)),
    "up and right": (0.5**0.5, -(0.5**0.5)),
    "down and left": (-(0.5**0.5), 0.5**0.5),
    "down and right": (0.5**0.5, 0.5**0.5),
}
STRAIGHT_FRAMES = 9
"""A clip starts so that this many frames pass before the first wall: its direction can be seen."""
EDGE = 1.6
"""Width of the soft edge of a shape, in pixels."""


@dataclass(frozen=True)
class Scene:
    """What a prompt says."""

    shape: str
    colour: str
    direction: str
    size: str = ""
    speed: str = ""
    background: str = "black"

    @property
    def prompt(self) -> str:
        where = "" if self.background == "black" else f"on a {self.background} background"
        words = ("a", self.size, self.colour, self.shape, "moving", self.speed, self.direction, where)
        return " ".join(word for word in words if word)

    @property
    def margin(self) -> float:
        """Distance from a wall at which the centre turns around."""
        return SIZES[self.size] * 1.13 + 0.5

    @property
    def velocity(self) -> tuple[float, float]:
        """(x, y) in pixels per frame before the first bounce; y points down."""
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]


def pick(choices, generator: torch.Generator):
    choices = list(choices)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def random_scene(generator: torch.Generator) -> Scene:
    """A scene; half of the sizes and speeds are the unnamed ones, three of five backgrounds are black."""
    chance = torch.rand(4, generator=generator).tolist()
    straight, diagonal = list(DIRECTIONS)[:4], list(DIRECTIONS)[4:]
    return Scene(
        shape=pick(SHAPES, generator),
        colour=pick(COLOURS, generator),
        direction=pick(straight if chance[0] < 0.6 else diagonal, generator),
        size=pick(SIZES, generator) if chance[1] < 0.75 else "",
        speed=pick(SPEEDS, generator) if chance[2] < 0.75 else "",
        background=pick(BACKGROUNDS, generator) if chance[3] < 0.6 else "black",
    )


def recoloured(scene: Scene, generator: torch.Generator) -> Scene:
    """The same scene in another colour."""
    return replace(scene, colour=pick([c for c in COLOURS if c != scene.colour], generator))


def starting_range(scene: Scene) -> tuple[tuple[float, float], tuple[float, float]]:
    """(from, to) in x and in y of the starts from which STRAIGHT_FRAMES frames pass without a bounce."""
    ranges = []
    for speed in scene.velocity:
        low, high = scene.margin, SIDE - scene.margin
        travel = speed * (STRAIGHT_FRAMES - 1)
        ranges.append((max(low, low - travel), min(high, high - travel)))
    return tuple(ranges)


def random_start(scene: Scene, generator: torch.Generator) -> tuple[float, float]:
    """A starting position from which STRAIGHT_FRAMES frames pass without a bounce."""
    return tuple(low + (high - low) * float(torch.rand((), generator=generator)) for low, high in starting_range(scene))


def trajectory(scene: Scene, start: tuple[float, float], frames: int) -> torch.Tensor:
    """Positions [frames, 2] (x, y) of the centre: straight lines folded back at the walls."""
    low, high = scene.margin, SIDE - scene.margin
    time = torch.arange(frames, dtype=torch.float32)[:, None]
    free = torch.tensor(start) + time * torch.tensor(scene.velocity) - low
    span = high - low
    return low + span - (free.remainder(2 * span) - span).abs()


def centre_of_mass(scene: Scene) -> tuple[float, float]:
    """(x, y) in pixels of the shape's centre of mass, from its centre."""
    return 0.0, 0.325 * SIZES[scene.size] if scene.shape == "triangle" else 0.0


def render(scenes: list[Scene], paths: torch.Tensor, colours: torch.Tensor | None = None) -> torch.Tensor:
    """Frames [B, 3, T, 64, 64] in [-1, 1] of `scenes` along `paths` [B, T, 2].

    colours: [B, T, 3] in 0..255 when the colour changes over time; else each scene's own.
    """
    batch, frames = paths.shape[:2]
    axis = torch.arange(SIDE) + 0.5
    x = axis.view(1, 1, 1, SIDE) - paths[..., 0].view(batch, frames, 1, 1)
    y = axis.view(1, 1, SIDE, 1) - paths[..., 1].view(batch, frames, 1, 1)
    inside = torch.empty(batch, frames, SIDE, SIDE)
    sizes = torch.tensor([SIZES[scene.size] for scene in scenes]).view(batch, 1, 1, 1)
    for shape in SHAPES:
        rows = torch.tensor([index for index, scene in enumerate(scenes) if scene.shape == shape], dtype=torch.long)
        inside[rows] = coverage(shape, sizes[rows], x[rows], y[rows])
    if colours is None:
        colours = torch.tensor([COLOURS[s.colour] for s in scenes], dtype=torch.float32)[:, None].expand(-1, frames, -1)
    front = colours.permute(0, 2, 1)[..., None, None] / 127.5 - 1
    back = torch.tensor([BACKGROUNDS[s.background] for s in scenes]).view(batch, 3, 1, 1, 1) / 127.5 - 1
    return back + (front - back) * inside[:, None]


def coverage(shape: str, size: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How much of each pixel the shape covers, 0..1, from the signed distance to its edge."""
    if shape == "circle":
        distance = (x.square() + y.square()).sqrt() - size
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.9 * size
    else:
        # Equilateral, pointing up: three half planes at the inner radius around a point below the middle of its box.
        inner = 0.65 * size
        below = y - 0.5 * inner
        distance = torch.maximum(below, 0.5 * (3**0.5 * x.abs() - below)) - inner
    return (0.5 - distance / EDGE).clamp(0, 1)
