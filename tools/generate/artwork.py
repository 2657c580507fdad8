"""Draws the pack's icon and banner: `python -m tools.generate.artwork`. A ring of latent frames around the sink, the newest one lit."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

from ..comfyui.env import PACK

ICON = PACK / "docs" / "images" / "icon.png"
BANNER = PACK / "docs" / "images" / "banner.png"
ICON_SIZE, BANNER_SIZE = (400, 400), (1260, 540)

DEEP, PETROL = (9, 44, 54), (18, 92, 104)
TEAL, FOAM, NEW = (94, 196, 190), (226, 246, 242), (255, 193, 122)
FRAMES = 12
SMOOTH = 4  # drawn so many times larger, then made smaller


def mix(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


def ground(width: int, height: int) -> Image.Image:
    """A slope of petrol, lightest at the upper left."""
    small = Image.new("RGB", (2, 2))
    small.putdata([PETROL, mix(PETROL, DEEP, 0.5), mix(PETROL, DEEP, 0.5), DEEP])
    return small.resize((width, height), Image.Resampling.BICUBIC)


def draw_ring(image: Image.Image, x: float, y: float, radius: float) -> None:
    """Frames around (x, y), each a rounded card that faces outwards; they pale with age. In the middle the sink."""
    draw = ImageDraw.Draw(image)
    long, short = radius * 0.36, radius * 0.27
    for age in range(FRAMES):
        angle = math.tau * (-age / FRAMES) - math.pi / 3
        colour = NEW if age == 0 else mix(TEAL, DEEP, 0.78 * (age - 1) / (FRAMES - 2))
        card = Image.new("L", (round(long), round(short)))
        ImageDraw.Draw(card).rounded_rectangle((0, 0, long - 1, short - 1), radius * 0.06, fill=255)
        card = card.rotate(-math.degrees(angle) - 90, expand=True, resample=Image.Resampling.BICUBIC)
        middle_x, middle_y = x + radius * math.cos(angle), y + radius * math.sin(angle)
        image.paste(colour, (round(middle_x - card.width / 2), round(middle_y - card.height / 2)), card)
    halo, dot = radius * 0.36, radius * 0.2
    draw.ellipse((x - halo, y - halo, x + halo, y + halo), outline=mix(PETROL, TEAL, 0.6), width=round(radius * 0.035))
    draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=FOAM)


def icon() -> Image.Image:
    width, height = (SMOOTH * side for side in ICON_SIZE)
    image = ground(width, height)
    draw_ring(image, width / 2, height / 2, width * 0.34)
    return image.resize(ICON_SIZE, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The ring, and the frames that have left it as a film that runs out to the right."""
    width, height = (SMOOTH * side for side in BANNER_SIZE)
    image = ground(width, height)
    draw = ImageDraw.Draw(image)
    x, y, radius = height * 0.52, height / 2, height * 0.34
    long, short = radius * 0.5, radius * 0.38
    count = 9
    for number in range(count):
        left = x + radius * 1.55 + number * long * 1.22
        colour = mix(TEAL, mix(PETROL, DEEP, 0.7), 0.25 + 0.7 * number / (count - 1))
        draw.rounded_rectangle((left, y - short / 2, left + long, y + short / 2), radius * 0.07, fill=colour)
    draw_ring(image, x, y, radius)
    return image.resize(BANNER_SIZE, Image.Resampling.LANCZOS)


def save(image: Image.Image, path: Path) -> None:
    image.save(path, optimize=True)
    print(f"{path.relative_to(PACK)}: {image.width}x{image.height}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    save(icon(), ICON)
    save(banner(), BANNER)
