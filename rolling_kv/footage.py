"""Pictures and videos of any kind as a source of frames, through PyAV."""

from __future__ import annotations

import io
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .fitting import BLACK, Clip, Fitting
from .geometry import WAN_21

if TYPE_CHECKING:
    import av

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Those that read the alpha channel too; the decoders that are chosen of themselves leave it out."""
_IMAGE_BRANDS = ("avif", "avis", "heic", "heix", "hevc", "mif1", "msf1")
_HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions by their codes in ITU-T H.273."""
_EXIF_ORIENTATION = 0x0112
_MIRRORED = (2, 4, 5, 7)
_NO_PICTURE = "give a .png, .jpg or .webp file (an animated .webp not), or a video"


@dataclass(frozen=True)
class Footage:
    """A file with a picture or a video in it, of which nothing is held in memory: `Footage.open`.

    Its pictures are as they are to be seen: turned as the file says, full-range RGB by the colour tags of the file, with
    the alpha channel.

    name: for messages. frames: in the file. height, width: pixels. pixel_aspect: width of a pixel by its height.
    fps: the average. start, last, end: seconds from the first picture on, of what may be taken; see `fitting.Source`.
    has_alpha: whether a part of the first picture is transparent. note: a sentence on what cannot be done well, or empty.
    """

    file: str | io.BytesIO
    name: str
    frames: int
    fps: Fraction
    start: Fraction
    last: Fraction
    end: Fraction
    pixel_aspect: Fraction = Fraction(1)
    height: int = 0
    width: int = 0
    has_alpha: bool = False
    note: str = ""
    _zero: Fraction = field(default=Fraction(0), repr=False)  # when the first picture comes by the file's own clock
    _timed: bool = field(default=True, repr=False)
    _mirrored: bool = field(default=False, repr=False)

    @classmethod
    def open(cls, file: str | Path | io.BytesIO, start: float = 0, seconds: float = 0) -> Footage:
        """Look into a file: go through its packets, and decode one picture.

        start: seconds to leave out at the beginning. seconds: to take from there, 0 for all.
        Raises ValueError for a file that holds no picture, or none that can be shown as it is meant.
        """
        import av

        in_memory = isinstance(file, io.BytesIO)
        name = "the video" if in_memory else str(file)
        if not in_memory and not Path(file).is_file():
            raise ValueError(f"{name}: there is no such file")
        try:
            return cls._seen_through(
                file if in_memory else os.path.abspath(file), name, Fraction(start), Fraction(seconds)
            )
        except (av.FFmpegError, IndexError, StopIteration) as error:
            raise ValueError(f"{name} holds no picture that can be read: {_NO_PICTURE}") from error

    @classmethod
    def _seen_through(cls, file, name: str, start: Fraction, seconds: Fraction) -> Footage:
        stamps, lengths, timed = array("q"), array("q"), True
        with _opened(file) as (container, stream):
            _check_parts(container, name)
            base, fps = stream.time_base, Fraction(stream.average_rate or stream.guessed_rate or WAN_21.fps)
            still = container.format.name.endswith("_pipe") or container.format.name == "image2"
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            hdr = _HDR.get(int(stream.codec_context.color_trc or 0))
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    stamp = _stamp(packet)
                    timed = timed and stamp is not None
                    stamps.append(0 if stamp is None else stamp)
                    lengths.append(packet.duration or 0)
        with _opened(file) as (container, stream):
            frame = next(_decoded(container, stream))
        if not timed:
            stamps, lengths, base = array("q", range(len(stamps))), array("q", bytes(8 * len(stamps))), 1 / fps
        zero = min(stamps) * base
        end = max(stamp * base + (length * base or 1 / fps) for stamp, length in zip(stamps, lengths)) - zero
        start = max(start, Fraction(0))
        if start >= end:
            raise ValueError(f"{name} is {float(end):g} s long, and is to be taken from {float(start):g} s on")
        end = min(end, start + seconds) if seconds > 0 else end
        last = max((time for stamp in stamps if start <= (time := stamp * base - zero) < end), default=start)
        footage = cls(
            file,
            name,
            len(stamps),
            fps,
            start,
            last,
            end,
            _zero=zero,
            _timed=timed,
            _mirrored=still and _mirrored(file),
        )
        picture = footage._as_seen(frame)
        if still:  # there it is the density of a print
            aspect = Fraction(1)
        return replace(
            footage,
            pixel_aspect=1 / aspect if _quarter_turns(frame, name) % 2 else aspect,
            height=picture.shape[0],
            width=picture.shape[1],
            has_alpha=picture.shape[2] == 4 and bool((picture[..., 3] < 255).any()),
            note=f"{name} has HDR colours ({hdr}): they are taken as they are, and look pale." if hdr else "",
        )

    def read(self, start: Fraction) -> Iterator[tuple[Fraction, Tensor]]:
        """Pictures with their times; see `fitting.Source`. Damaged ones are left out: the one before stays in view."""
        frames = self._read(start if self._timed else Fraction(0))
        first = next(frames, None)
        if first is None or first[0] > start > 0:  # there was no key frame to go to
            return self._read(Fraction(0))
        return chain([first], frames)

    def _read(self, start: Fraction) -> Iterator[tuple[Fraction, Tensor]]:
        with _opened(self.file) as (container, stream):
            if start > 0:
                container.seek(int((start + self._zero) / stream.time_base), stream=stream)
            latest = Fraction(0)
            for index, frame in enumerate(_decoded(container, stream)):
                stamp = _stamp(frame) if self._timed else None
                latest = max(index / self.fps if stamp is None else stamp * stream.time_base - self._zero, latest)
                yield latest, self._as_seen(frame)

    def _as_seen(self, frame: av.VideoFrame) -> Tensor:
        """A frame as uint8 [H, W, 3], or [H, W, 4] where it has an alpha channel."""
        from av.video.reformatter import ColorRange

        alpha = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
        # PyAV before 18 heeds the colour tags only when it is told a range.
        picture = frame.reformat(format="rgba" if alpha else "rgb24", dst_color_range=ColorRange.JPEG).to_ndarray()
        picture = picture[::-1] if self._mirrored else picture
        return torch.from_numpy(np.ascontiguousarray(np.rot90(picture, _quarter_turns(frame, self.name))))


def read_picture(
    path: str | Path, height: int, width: int, fit: str = "crop", background: tuple[float, float, float] = BLACK
) -> Tensor:
    """A picture, or the first frame of a video, as [1, 3, 1, height, width] in [-1, 1].

    fit, background: see `Fitting`. Raises ValueError for a file that holds no picture.
    """
    clip = Clip.of(Footage.open(path), Fitting(height, width, fit, background), WAN_21, "first", 1 / WAN_21.fps)
    return next(clip.frames())


@contextmanager
def _opened(file: str | io.BytesIO):
    """The container, and the stream in it that players show."""
    import av

    if isinstance(file, io.BytesIO):
        file.seek(0)
    with av.open(file) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise IndexError("no video stream")
        stream.thread_type = "AUTO"
        yield container, stream


def _check_parts(container, name: str) -> None:
    """Raise ValueError for a picture that is kept in parts, of which a decoder gives only one."""
    if container.metadata.get("major_brand") in _IMAGE_BRANDS and len(container.streams.video) > 1:
        raise ValueError(
            f"{name} keeps its picture in several parts (tiles, an alpha channel, an animation), which cannot be put "
            "together here: save it as .png, or as a video"
        )


def _stamp(item) -> int | None:
    """When a packet or a frame is to be seen, in its time base; None in streams without a clock."""
    return item.dts if item.pts is None else item.pts


def _decoded(container, stream) -> Iterator[av.VideoFrame]:
    """The frames of a stream in the order in which they are seen, without those that are damaged."""
    import av

    decoder: Any = stream.codec_context
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if tags.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
        decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
    for packet in container.demux(stream):
        try:
            frames = decoder.decode(packet if packet.size else None)
        except av.InvalidDataError:
            continue
        yield from frames


def _mirrored(file: str | io.BytesIO) -> bool:
    """Whether a picture is to be mirrored before it is turned, top to bottom; PyAV tells the turn alone."""
    try:
        with Image.open(file) as picture:
            return picture.getexif().get(_EXIF_ORIENTATION) in _MIRRORED
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _quarter_turns(frame: av.VideoFrame, name: str) -> int:
    """How often a frame is to be turned by 90 degrees against the clock."""
    turns, rest = divmod(round(frame.rotation), 90)
    if rest:
        raise ValueError(
            f"{name} is to be shown turned by {round(frame.rotation)} degrees: only right angles can be done, so turn it "
            "before"
        )
    return turns
