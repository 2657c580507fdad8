"""The animated picture of the README, and frames of the same video: a schedule with a switch, a cut and a blend.

python -m tools.steered     # writes docs/images/steered.webp and steered.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

from rolling_kv.atomic import replacing
from rolling_kv.bundled import BUNDLED, BUNDLED_SIZE
from rolling_kv.geometry import WAN_21
from rolling_kv.pipeline import Pipeline

STORY = (
    (0, "a big red circle moving quickly right", ""),
    (5, "a big cyan square moving slowly right on a navy background", "recache"),
    (10, "a big yellow triangle standing still on a white background", "cut"),
    (15, "a big purple triangle moving quickly up and left on a grey background", "blend 4"),
    (21, "", "end"),
)
"""From which chunk on, the prompt, and how it takes over."""
CHUNK = 3
SCALE, CAPTION = 4, 52
"""Enlargement, and the height of the text below, in pixels."""
SHOWN = 12
"""Frames in the still picture."""
EVERY = 2
"""Of the video's frames, those in the animation; a browser shows it at 8 frames per second."""
PAPER, INK, FAINT = (24, 24, 30), (232, 232, 238), (150, 150, 162)


def seconds(chunk: int) -> float:
    return WAN_21.pixel_frames(CHUNK * chunk) / WAN_21.fps if chunk else 0.0


def schedule() -> str:
    lines = ([f"{seconds(chunk):g}:", prompt, how and f"[{how}]"] for chunk, prompt, how in STORY)
    return "\n".join(" ".join(filter(None, line)) for line in lines)


def frames(seed: int) -> list[Image.Image]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        size = dict(height=BUNDLED_SIZE, width=BUNDLED_SIZE, scale=SCALE)
        Pipeline.load(BUNDLED).generate(None, path, schedule=schedule(), seed=seed, **size)
        with av.open(path) as container:
            return [frame.to_image() for frame in container.decode(video=0)]


def captioned(frame: Image.Image, at: float) -> Image.Image:
    """The frame with the prompt that holds at that second below it."""
    _, prompt, how = next(part for part in reversed(STORY[:-1]) if seconds(part[0]) <= at)
    sheet = Image.new("RGB", (frame.width, frame.height + CAPTION), PAPER)
    sheet.paste(frame)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    words, lines = prompt.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) < frame.width - 70 else [*lines, word]
    for number, line in enumerate(lines):
        draw.text((8, frame.height + 5 + 15 * number), line, INK, font)
    label = f"{at:.0f} s" + (f", {how}" if how else "")
    draw.text((frame.width - 8 - font.getlength(label), frame.height + 5), label, FAINT, font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    video = frames(arguments.seed)
    film = [captioned(frame, index / WAN_21.fps) for index, frame in enumerate(video)][::EVERY]
    options = dict(save_all=True, append_images=film[1:], duration=round(1000 * EVERY / WAN_21.fps), loop=0)
    with replacing(arguments.folder / "steered.webp", what="picture") as file:
        film[0].save(file, "WEBP", quality=60, method=6, **options)
    chosen = [video[round(i * (len(video) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    strip = Image.new("RGB", (SHOWN // 2 * 130 - 2, 258), "white")
    for number, frame in enumerate(chosen):
        strip.paste(frame.resize((128, 128)), (130 * (number % (SHOWN // 2)), 130 * (number // (SHOWN // 2))))
    with replacing(arguments.folder / "steered.png", what="picture") as file:
        strip.save(file, "PNG", optimize=True)


if __name__ == "__main__":
    main()
