"""A picture of curves with axes and a legend. Needs Pillow alone, which every ComfyUI has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 600
SCALE = 2  # drawn larger and reduced: Pillow's lines have hard edges
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
"""Told apart with any colour vision (Okabe and Ito); from the eighth curve on they repeat."""
MARKED = 40
"""Most points of a curve that are marked one by one; more would cover it."""
INK, FAINT, PAPER = "#222222", "#dddddd", "#ffffff"


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    label: for the reader.
    exact: how to name infinite values, which are drawn above all others; y only.
    from_zero: whether it begins at 0, so that lengths can be compared.
    whole: whether it counts, and has no place between two numbers.
    """

    label: str
    exact: str = ""
    from_zero: bool = False
    whole: bool = False

    def ticks(self, values: Sequence[float]) -> list[float]:
        """Round numbers at equal distances that hold these values."""
        return ticks([0.0, *values] if self.from_zero else values, whole=self.whole)


def draw(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x: Axis,
    y: Axis,
    title: str,
    *,
    mark_x: float | None = None,
    height: int = HEIGHT,
) -> Image.Image:
    """Curves by name, each through its points (x, y) in their order.

    curves: one without points is not shown, and keeps its colour free.
    mark_x: an upright line there.
    height: of the picture, in pixels.

    Points with an infinite y need `y.exact`. Raises ValueError without any point.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("there is nothing to draw: no curve has a point")
    picture = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
    pen = ImageDraw.Draw(picture)
    small, normal = (ImageFont.load_default(size * SCALE) for size in (13, 14))
    edge = 16 * SCALE

    lines = list(_wrapped(title, partial(pen.textlength, font=small), picture.width - 2 * edge))
    for row, line in enumerate(lines):
        pen.text((edge, edge + row * 18 * SCALE), line, fill=INK, font=small)
    legend_width = 44 * SCALE + max(round(pen.textlength(name, font=normal)) for name in curves if curves[name])
    left, right = edge + 72 * SCALE, picture.width - edge - legend_width - 16 * SCALE
    top, bottom = edge + (len(lines) * 18 + 16) * SCALE, picture.height - edge - 52 * SCALE

    x_ticks = x.ticks([px for px, _ in points] + ([] if mark_x is None else [mark_x]))
    finite = [py for _, py in points if math.isfinite(py)]
    y_ticks = y.ticks(finite or [0.0, 50.0])
    step = y_ticks[1] - y_ticks[0]
    above = y_ticks[-1] + step if len(finite) < len(points) else y_ticks[-1]

    def place(px: float, py: float) -> tuple[float, float]:
        px = (px - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        py = (min(py, above) - y_ticks[0]) / (above - y_ticks[0])
        return left + px * (right - left), bottom - py * (bottom - top)

    for tick in x_ticks:
        at = place(tick, y_ticks[0])[0]
        pen.line((at, top, at, bottom), fill=FAINT, width=SCALE)
        pen.text((at, bottom + 8 * SCALE), f"{tick:.10g}", fill=INK, font=normal, anchor="mt")
    named = [(tick, f"{tick:.10g}") for tick in y_ticks] + [(above, y.exact)] * (above > y_ticks[-1])
    for tick, name in named:
        at = place(x_ticks[0], tick)[1]
        pen.line((left, at, right, at), fill=FAINT, width=SCALE)
        pen.text((left - 8 * SCALE, at), name, fill=INK, font=normal, anchor="rm")
    if mark_x is not None:
        at = place(mark_x, y_ticks[0])[0]
        pen.line((at, top, at, bottom), fill="#888888", width=2 * SCALE)
    pen.line((left, top, left, bottom, right, bottom), fill=INK, width=SCALE)
    pen.text(((left + right) / 2, picture.height - edge), x.label, fill=INK, font=normal, anchor="mb")
    _upright(picture, y.label, normal, edge, (top + bottom) // 2)

    rows = iter(range(top + 12 * SCALE, picture.height, 26 * SCALE))
    for index, (name, curve) in enumerate(curves.items()):
        if not curve:
            continue
        colour = COLOURS[index % len(COLOURS)]
        places = [place(*point) for point in curve]
        if len(places) > 1:
            pen.line(places, fill=colour, width=2 * SCALE, joint="curve")
        for at in places if len(places) <= MARKED else ():
            _marker(pen, index, at, colour)
        row = next(rows)
        start = right + 16 * SCALE
        pen.line((start, row, start + 32 * SCALE, row), fill=colour, width=2 * SCALE)
        _marker(pen, index, (start + 16 * SCALE, row), colour)
        pen.text((start + 44 * SCALE, row), name, fill=INK, font=normal, anchor="lm")
    return picture.resize((WIDTH, height), Image.Resampling.LANCZOS)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width, one below the other."""
    whole = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def ticks(values: Sequence[float], most: int = 8, whole: bool = False) -> list[float]:
    """Round numbers at equal distances, from at or below the least value to at or above the greatest.

    whole: none of them between two integers.
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    span = high - low
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(size * unit for size in (1, 2, 5, 10, 20) if span / (size * unit) <= most - 1)
    step = max(step, 1) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _wrapped(text: str, width_of, limit: float) -> Iterator[str]:
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and width_of(longer) > limit:
                yield line
                line = word
            else:
                line = longer
        yield line


def _upright(picture: Image.Image, text: str, font, left: int, middle: int) -> None:
    """Text that reads from bottom to top, centred on a height."""
    _, _, width, height = map(math.ceil, font.getbbox(text))
    strip = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, fill=INK, font=font)
    picture.paste(strip.rotate(90, expand=True), (left, middle - width // 2))


def _marker(pen: ImageDraw.ImageDraw, index: int, at: tuple[float, float], colour: str) -> None:
    """A disc or a polygon: curves differ by shape as well as by colour."""
    radius = 6 * SCALE
    turn = (0, 45, 0, 180, 0, 0)[index % 6]
    corners = (0, 4, 3, 3, 4, 5)[index % 6]
    if corners:
        pen.regular_polygon((*at, radius * 1.2), corners, rotation=turn, fill=colour, outline=PAPER, width=SCALE)
    else:
        box = (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)
        pen.ellipse(box, fill=colour, outline=PAPER, width=SCALE)
