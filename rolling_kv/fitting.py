"""Pictures of any size, shape and rate, made into the frames that a model knows.

A *source* is anything with pictures at times: a tensor (`Pictures`), or a file (`footage.Footage`). A `Clip` is what is
taken of a source: which moments, and how each picture comes to the size. It reads as it is read, and holds one picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from .geometry import Geometry

FITS = ("crop", "pad", "stretch")
"""Cut off what sticks out on both sides; show all of it between bars; or distort it."""
TAKES = ("all", "first", "last")
BLACK = (0.0, 0.0, 0.0)
_LATE = Fraction(1, 8)
"""Of a frame: a timestamp that is late by so much counts as on time. Many files round theirs to milliseconds."""

T = TypeVar("T")


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Fitting:
    """How pictures come to one size.

    height, width: pixels of the result.
    how: one of `FITS`.
    background: red, green and blue from 0 to 1: what shows through where a picture is transparent, and the bars of "pad".
    """

    height: int
    width: int
    how: str = "crop"
    background: tuple[float, float, float] = BLACK

    def __post_init__(self):
        if self.how not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {self.how!r}")

    def boxes(self, rows: int, columns: int, pixel_aspect: Fraction = Fraction(1)) -> tuple[Box, Box]:
        """What is kept of a picture, and where that comes to lie in the result.

        pixel_aspect: width of a pixel of the picture, as a multiple of its height.
        """
        kept, filled = Box(0, 0, rows, columns), Box(0, 0, self.height, self.width)
        if self.how == "stretch":
            return kept, filled
        seen = columns * pixel_aspect  # its width in pixels as high as wide
        too_wide = seen * self.height > rows * self.width
        if self.how == "crop" and too_wide:
            kept = _middle(rows, columns, rows, Fraction(rows * self.width, self.height) / pixel_aspect)
        elif self.how == "crop":
            kept = _middle(rows, columns, seen * self.height / self.width, columns)
        elif too_wide:
            filled = _middle(self.height, self.width, rows * self.width / seen, self.width)
        else:
            filled = _middle(self.height, self.width, self.height, seen * self.height / rows)
        return kept, filled

    def __call__(self, pictures: Tensor, pixel_aspect: Fraction = Fraction(1)) -> Tensor:
        """Fit pictures [T, H, W, C], uint8 or floats from 0 to 1; returns float32 [1, 3, T, height, width] in [-1, 1].

        C: 1 grey, 2 grey and alpha, 3 colours, 4 colours and alpha. What is transparent is not seen: the background is.
        Raises ValueError for tensors of another shape.
        """
        if pictures.ndim != 4 or not 1 <= pictures.shape[3] <= 4 or 0 in pictures.shape:
            raise ValueError(f"pictures must be [T, H, W, 1 to 4 channels], got {list(pictures.shape)}")
        _, rows, columns, _ = pictures.shape
        kept, filled = self.boxes(rows, columns, pixel_aspect)
        pixels = pictures[:, kept.top :, kept.left :][:, : kept.height, : kept.width].movedim(3, 1)
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        background = pixels.new_tensor(self.background).view(1, 3, 1, 1)
        if pixels.shape[1] % 2 == 0:  # before they are mixed, so that no hidden colour gets into its neighbours
            alpha = pixels[:, -1:].clamp(0, 1)
            pixels = pixels[:, :-1] * alpha + background * (1 - alpha)
        pixels = pixels.expand(-1, 3, -1, -1)
        if (kept.height, kept.width) != (filled.height, filled.width):
            pixels = functional.interpolate(pixels, (filled.height, filled.width), mode="bicubic", antialias=True)
        if filled.area < self.height * self.width:
            around = background.expand(len(pixels), 3, self.height, self.width).clone()
            around[:, :, filled.top :, filled.left :][:, :, : filled.height, : filled.width] = pixels
            pixels = around
        return pixels.clamp(0, 1).movedim(0, 1).unsqueeze(0) * 2 - 1

    def words(self, rows: int, columns: int, pixel_aspect: Fraction = Fraction(1)) -> str:
        """What it does to a picture of that size, as people say it; empty where nothing is lost."""
        kept, filled = self.boxes(rows, columns, pixel_aspect)
        if self.how == "stretch":
            ratio = float(Fraction(self.width * rows, self.height * columns) / pixel_aspect)
            return f"stretched {_percent(max(ratio, 1 / ratio) - 1)}" if abs(ratio - 1) > 0.004 else ""
        if self.how == "crop":
            return f"cropped {_percent(1 - kept.area / (rows * columns))}" if kept.area < rows * columns else ""
        bars = 1 - filled.area / (self.height * self.width)
        return f"bars on {_percent(bars)}" if bars else ""


def _middle(rows: int, columns: int, height: float | Fraction, width: float | Fraction) -> Box:
    """The middle of a picture, of about that height and width, at least a pixel and at most all of it."""
    height, width = min(max(round(height), 1), rows), min(max(round(width), 1), columns)
    return Box((rows - height) // 2, (columns - width) // 2, height, width)


def _percent(share: float) -> str:
    return f"{max(round(share * 100), 1)} %"


def read_colour(text: str) -> tuple[float, float, float]:
    """A colour such as #102030 as red, green and blue from 0 to 1. Raises ValueError for other text."""
    digits = re.fullmatch(r"#?([0-9a-fA-F]{6})", text.strip())
    if digits is None:
        raise ValueError(
            f"a colour is written as # and six digits, #000000 for black or #ffffff for white; got {text!r}"
        )
    red, green, blue = bytes.fromhex(digits[1])
    return red / 255, green / 255, blue / 255


class Source(Protocol):
    """Pictures at times, in seconds from the first one on.

    start, last, end: of what may be taken: where it begins, when its last picture comes, and when that goes.
    """

    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def pixel_aspect(self) -> Fraction: ...
    @property
    def fps(self) -> Fraction: ...
    @property
    def start(self) -> Fraction: ...
    @property
    def last(self) -> Fraction: ...
    @property
    def end(self) -> Fraction: ...
    @property
    def has_alpha(self) -> bool: ...

    def read(self, start: Fraction) -> Iterator[tuple[Fraction, Tensor]]:
        """Pictures [H, W, C] with their times, rising, from the one that is seen at `start` or an earlier one on."""
        ...


@dataclass(frozen=True)
class Pictures:
    """Pictures in memory as a source: [T, H, W, C], so many a second."""

    pictures: Tensor
    fps: Fraction

    pixel_aspect = Fraction(1)
    start = Fraction(0)

    def __post_init__(self):
        if self.pictures.ndim != 4 or 0 in self.pictures.shape:
            raise ValueError(f"pictures must be [T, H, W, C], got {list(self.pictures.shape)}")

    @property
    def frames(self) -> int:
        return self.pictures.shape[0]

    @property
    def height(self) -> int:
        return self.pictures.shape[1]

    @property
    def width(self) -> int:
        return self.pictures.shape[2]

    @property
    def last(self) -> Fraction:
        return (self.frames - 1) / self.fps

    @property
    def end(self) -> Fraction:
        return self.frames / self.fps

    @property
    def has_alpha(self) -> bool:
        return self.pictures.shape[3] % 2 == 0

    def read(self, start: Fraction) -> Iterator[tuple[Fraction, Tensor]]:
        for index in range(max(math.floor(start * self.fps), 0), self.frames):
            yield index / self.fps, self.pictures[index]


@dataclass(frozen=True)
class Clip:
    """Frames of one size and rate, taken of a source: frame k is what is seen there at `start + k / fps`.

    source: where they come from. fitting: how they come to their size.
    fps: of the model. start: seconds. count: frames, 1 + 4n of them. take: which part of the source that is, of `TAKES`.
    """

    source: Source
    fitting: Fitting
    fps: int
    start: Fraction
    count: int
    take: str

    @classmethod
    def of(cls, source: Source, fitting: Fitting, geometry: Geometry, take: str = "all", seconds: float = 0) -> Clip:
        """What a model of that geometry sees of a source.

        take: "all", or the "first" or "last" `seconds`, rounded up to whole latent frames where there are as many. The last
            end with the source's very last picture, the others begin with its first one; what is too much for whole latent
            frames is left out at the other end.
        Raises ValueError for another word, and for seconds that are not positive.
        """
        if take not in TAKES:
            raise ValueError(f"what is taken must be one of {', '.join(TAKES)}, got {take!r}")
        if take != "all" and not 0 < seconds < math.inf:
            raise ValueError(f"the seconds to be taken must be positive, got {seconds}")
        if take == "last":
            count = math.floor((source.last - source.start) * geometry.fps + _LATE) + 1
        else:
            count = math.ceil((source.end - source.start) * geometry.fps - _LATE)
        count = 1 if source.frames == 1 else max(count, 1)
        if take != "all":
            count = min(geometry.pixel_frames(geometry.latent_frames(max(round(seconds * geometry.fps), 1))), count)
        count = geometry.whole_frames(count)
        start = source.last - Fraction(count - 1, geometry.fps) if take == "last" else source.start
        return cls(source, fitting, geometry.fps, start, count, take)

    def frames(self) -> Iterator[Tensor]:
        """The frames in order, float32 [1, 3, 1, height, width] in [-1, 1]."""
        seen, fitted = None, torch.empty(0)
        moments = (self.start + Fraction(index, self.fps) for index in range(self.count))
        for picture in on_screen(self.source.read(self.start), moments, _LATE / self.fps):
            if picture is not seen:
                seen, fitted = picture, self.fitting(picture[None], self.source.pixel_aspect)
            yield fitted

    def __str__(self) -> str:
        """What becomes of the source, in a line."""
        source, fitting = self.source, self.fitting
        before, after = f"{source.width}x{source.height}", f"{fitting.width}x{fitting.height}"
        said = [fitting.words(source.height, source.width, source.pixel_aspect)]
        if source.has_alpha:
            colour = "".join(f"{round(value * 255):02x}" for value in fitting.background)
            said.append(f"transparent parts on #{colour}")
        if source.pixel_aspect != 1:
            said.append(f"pixels {source.pixel_aspect.numerator}:{source.pixel_aspect.denominator}")
        if source.frames > 1:
            before, after = f"{before} at {_number(source.fps)} fps", f"{after} at {self.fps} fps"
            whole, taken = source.end - source.start, Fraction(self.count, self.fps)
            part = f"the {self.take} " if self.take != "all" and taken < whole else ""
            frames = f"{self.count} frame{'s' * (self.count > 1)}"
            said.append(f"{frames}, {part}{_number(taken)} of {_number(whole)} s")
        return ", ".join([f"{before} -> {after}", *filter(None, said)])


def _number(value: Fraction) -> str:
    return f"{round(float(value), 2):g}"


def on_screen(frames: Iterable[tuple[Fraction, T]], moments: Iterable[Fraction], late: Fraction) -> Iterator[T]:
    """What is seen at each moment: the last frame that has come by then, or the first one before any has.

    frames: with their times, rising. moments: rising. late: by so much a frame may come after its moment.
    The last frame stays for all moments behind it.
    """
    frames = iter(frames)
    following = next(frames, None)
    if following is None:
        return
    current = following
    for moment in moments:
        while following is not None and (following is current or following[0] <= moment + late):
            current, following = following, next(frames, None)
        yield current[1]
