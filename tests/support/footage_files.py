"""Pictures and videos of many kinds, written by Pillow and PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def quarters(height: int = 24, width: int = 36, alpha: bool = False) -> np.ndarray:
    """uint8 [H, W, 3 or 4]: red and green over blue and white; with alpha the left half is transparent."""
    picture = np.full((height, width, 4), 255, np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0, 255)
    picture[: height // 2, width // 2 :] = (0, 255, 0, 255)
    picture[height // 2 :, : width // 2] = (0, 0, 255, 255)
    picture[:, : width // 2, 3] = 0
    return picture if alpha else picture[..., :3]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def write_clip(
    path: Path,
    pictures: np.ndarray,
    fps: float | Fraction = 16,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    times: list[int] | None = None,
    time_base: Fraction | None = None,
    pixel_aspect: Fraction | None = None,
    turn: int = 0,
    options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A video of uint8 pictures [T, H, W, 3 or 4]. times: when each is seen, in units of `time_base`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        stream.height, stream.width, stream.pix_fmt = pictures.shape[1], pictures.shape[2], pix_fmt
        stream.metadata.update(metadata or {})
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if turn:
            stream.set_display_rotation(turn)
        if times:
            stream.codec_context.time_base = time_base
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt)
            if times:
                frame.pts, frame.time_base = times[index], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def greys(count: int, height: int = 32, width: int = 48, step: int = 5) -> np.ndarray:
    """Frames that tell their number: frame k is grey k * step."""
    shades = (np.arange(count) * step).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, height, width, 3)).copy()
