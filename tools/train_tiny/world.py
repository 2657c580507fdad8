"""The world of the tiny model: one shape that glides over a plain background and bounces off the walls, or stands still.

Frames are 64x64 RGB in [-1, 1] at 16 fps. Positions and lengths are in pixels, speeds in pixels per frame. A prompt says
what is seen and how fast it moves, at any time of a video; and where the shape moves *first*, because a wall turns it around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
BACKGROUNDS = {"black": (18, 18, 24), "grey": (112, 112, 118), "white": (238, 236, 230), "navy": (22, 36, 92)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 8.5, "big": 12.0}
"""Half of the width, about, in pixels."""
SPEEDS = {"slowly": 0.7, "": 1.2, "quickly": 1.9, "still": 0.0}
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
FASTER, FURTHER = 0.7, 1.5
"""How much faster, in pixels per frame, and how much further, in pixels, a shape is on the ways of `moved`."""
SMALLER = 0.85
"""How large a shape is, of its own size, on the way to a smaller one."""
STILL = 0.1
"""Share of the scenes in which the shape stands still."""
STRIPE, STRIPE_SHADE = 8, 52
"""The striped style: every second row of so many pixels is so much lighter, or darker where the background is light."""
STRIPED = 0.15
"""Share of the striped scenes among those that the latent space and the VAE are made for."""


@dataclass(frozen=True)
class Scene:
    """What a prompt says. striped: a style that no prompt names; the LoRA brings it."""

    shape: str
    colour: str
    direction: str
    size: str = "small"
    speed: str = ""
    background: str = "black"
    striped: bool = False

    @property
    def prompt(self) -> str:
        """All of it in the plain grammar; a background that is not named is black."""
        motion = "standing still" if self.speed == "still" else f"moving {self.speed} {self.direction}"
        where = "" if self.background == "black" else f"on a {self.background} background"
        return " ".join(f"a {self.size} {self.colour} {self.shape} {motion} {where}".split())

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


def chance(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def random_scene(generator: torch.Generator, striped: float = 0.0, still: float = STILL) -> Scene:
    """A scene; half of the backgrounds are black. striped, still: shares of that style, and of shapes that do not move."""
    straight, diagonal = list(DIRECTIONS)[:4], list(DIRECTIONS)[4:]
    return Scene(
        shape=pick(SHAPES, generator),
        colour=pick(COLOURS, generator),
        direction=pick(straight if chance(generator) < 0.6 else diagonal, generator),
        size=pick(SIZES, generator),
        speed="still" if chance(generator) < still else pick(list(SPEEDS)[:3], generator),
        background=pick(BACKGROUNDS, generator) if chance(generator) < 0.67 else "black",
        striped=chance(generator) < striped,
    )


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
    return tuple(low + (high - low) * chance(generator) for low, high in starting_range(scene))


class Track:
    """Where the shapes of B videos are: straight lines from `start` [B, 2] at time 0, folded back at the walls."""

    def __init__(self, scenes: Sequence[Scene], start: torch.Tensor | None = None):
        self.scenes = list(scenes)
        self.velocity = torch.tensor([scene.velocity for scene in scenes])
        margin = torch.tensor([scene.margin for scene in scenes])[:, None]
        self.low, self.span = margin, SIDE - 2 * margin
        self.start = torch.full_like(self.velocity, SIDE / 2) if start is None else start

    def free(self, times: torch.Tensor) -> torch.Tensor:
        """Positions [B, T, 2] at the frame numbers `times` [T] as if there were no walls, from the low ones."""
        return self.start[:, None] + times[:, None] * self.velocity[:, None] - self.low[:, None]

    def at(self, times: torch.Tensor) -> torch.Tensor:
        """Positions [B, T, 2] of the centres at the frame numbers `times` [T]."""
        span = self.span[:, None]
        return self.low[:, None] + span - (self.free(times).remainder(2 * span) - span).abs()

    def turn(self, scenes: Sequence[Scene], time: float) -> None:
        """Move as `scenes` say from frame `time` on: as fast, the way that they go, or where they stood, as said."""
        stood = torch.tensor([scene.speed == "still" for scene in self.scenes])[:, None]
        before = torch.tensor([SPEEDS[scene.speed] for scene in self.scenes])[:, None]
        after = torch.tensor([SPEEDS[scene.speed] for scene in scenes])[:, None]
        said = torch.tensor([scene.velocity for scene in scenes])
        velocity = torch.where(stood, said, self.velocity * after / before.clamp_min(1e-6))
        here = torch.where(stood, self.at(torch.tensor([float(time)]))[:, 0], self.start + time * self.velocity)
        self.start, self.velocity, self.scenes = here - time * velocity, velocity, list(scenes)


def trajectory(scene: Scene, start: tuple[float, float], frames: int) -> torch.Tensor:
    """Positions [frames, 2] (x, y) of the centre: straight lines folded back at the walls."""
    return Track([scene], torch.tensor([start])).at(torch.arange(frames, dtype=torch.float32))[0]


def centre_of_mass(scene: Scene) -> tuple[float, float]:
    """(x, y) in pixels of the shape's centre of mass, from its centre."""
    return 0.0, 0.325 * SIZES[scene.size] if scene.shape == "triangle" else 0.0


def render(scenes: list[Scene], paths: torch.Tensor, colours: torch.Tensor | None = None) -> torch.Tensor:
    """Frames [B, 3, T, 64, 64] in [-1, 1] of `scenes` along `paths` [B, T, 2].

    colours: [B, T, 3] in 0..255 when the colour changes over time; else each scene's own.
    """
    inside = covered([scene.shape for scene in scenes], [scene.size for scene in scenes], paths)
    if colours is None:
        colours = torch.tensor([COLOURS[s.colour] for s in scenes], dtype=torch.float32)[:, None]
        colours = colours.expand(-1, paths.shape[1], -1)
    front = colours.permute(0, 2, 1)[..., None, None] / 127.5 - 1
    back = backdrop(scenes).repeat_interleave(STRIPE, 1).transpose(1, 2)[:, :, None, :, None]  # [B, 3, 1, 64, 1]
    return back + (front - back) * inside[:, None]


def covered(shapes: Sequence[str], sizes: Sequence[str], paths: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """How much of each pixel [B, T, 64, 64] shapes of these names cover along `paths` [B, T, 2]; share: of their sizes."""
    batch, frames = paths.shape[:2]
    axis = torch.arange(SIDE) + 0.5
    x = axis.view(1, 1, 1, SIDE) - paths[..., 0].view(batch, frames, 1, 1)
    y = axis.view(1, 1, SIDE, 1) - paths[..., 1].view(batch, frames, 1, 1)
    inside = torch.empty(batch, frames, SIDE, SIDE)
    halves = share * torch.tensor([SIZES[size] for size in sizes]).view(batch, 1, 1, 1)
    for shape in SHAPES:
        rows = torch.tensor([index for index, name in enumerate(shapes) if name == shape], dtype=torch.long)
        inside[rows] = coverage(shape, halves[rows], x[rows], y[rows])
    return inside


def moved(inside: torch.Tensor, frames: int) -> torch.Tensor:
    """How coverage [B, T, 64, 64] changes, [4, B, T, 64, 64], if in each piece of `frames` frames the shape is FASTER to the
    right, or downwards, around the same middle; or FURTHER to the right, or down."""
    time = torch.arange(inside.shape[1]) % frames - (frames - 1) / 2
    step = torch.stack([inside.roll(1, axis) - inside.roll(-1, axis) for axis in (3, 2)]) / 2  # by one pixel
    return torch.cat([FASTER * time[:, None, None] * step, FURTHER * step])


def other_shapes(shape: str) -> tuple[str, ...]:
    return tuple(SHAPES[(SHAPES.index(shape) + turn) % len(SHAPES)] for turn in range(1, len(SHAPES)))


LOOKS = {"shape": SHAPES, "size": tuple(SIZES), "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}


def look_numbers(scene: Scene) -> torch.Tensor:
    """Which of each of LOOKS it is, [4]."""
    return torch.tensor([names.index(getattr(scene, kind)) for kind, names in LOOKS.items()])


def latent_places(paths: torch.Tensor) -> torch.Tensor:
    """Mean positions [B, F, 2] in latent frames of 4 frames each along `paths` [B, T, 2]; the first may be one alone."""
    if paths.shape[1] % 4:
        paths = torch.cat([paths[:, :1].expand(-1, 3, -1), paths], 1)
    return paths.unflatten(1, (-1, 4)).mean(2)


def backdrop(scenes: Sequence[Scene]) -> torch.Tensor:
    """Colours [B, 8, 3] in [-1, 1] of the rows of the background, STRIPE pixels each: alike, unless they are striped."""
    plain = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
    shade = torch.where(plain.mean(1) < 160, STRIPE_SHADE, -STRIPE_SHADE)[:, None]
    shade = shade * torch.tensor([scene.striped for scene in scenes])[:, None] * (torch.arange(SIDE // STRIPE) % 2)
    return (plain[:, None] + shade[..., None]) / 127.5 - 1


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
