"""Video files through PyAV: an mp4 written frame by frame, read back for tests and benchmarks.

PyAV is imported where a file is opened or written: everything else, benchmarks of a GPU above all, goes without it.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from .atomic import check_place, replacing
from .geometry import WAN_21

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

H264_SIDE = 16384
"""Most pixels along one side of a picture that libx264 takes."""
X264 = "cpu-independent=1:rc-lookahead=8:sync-lookahead=0"
"""Options of x264: what lies in memory by chance stays out of the file, and no more than nine frames wait in the encoder."""


class Encoder(NamedTuple):
    """codec: FFmpeg's name of it. quality: its option for `crf`. options: its others. tag: of its streams in an mp4; "": the usual one."""

    codec: str
    quality: str
    options: dict[str, str]
    tag: str = ""


PLAIN = "x264"
"""The encoder that is always there."""
NVENC = {"preset": "p5", "tune": "hq", "rc": "vbr", "delay": "0"}
ENCODERS = {
    PLAIN: Encoder("libx264", "crf", {"x264-params": X264}),
    "h264_nvenc": Encoder("h264_nvenc", "cq", NVENC),
    "hevc_nvenc": Encoder("hevc_nvenc", "cq", NVENC, tag="hvc1"),  # the one that Apple's players take
}
"""What encodes videos, by the names that people choose: on the CPU, or on the circuits for that of an NVIDIA GPU."""
FINISHED = {"movflags": "+faststart"}
"""Options of an mp4 whose index comes first, so that browsers can play it."""
_BT709 = 1
"""The code of BT.709 for primaries, transfer and matrix alike (ITU-T H.273)."""


class VideoWriter:
    """Writes frames to an mp4 as they come; holds none of them.

    A context manager. Entering it makes the folder and the file, so a place that cannot be written to shows before any
    work; the video appears under its own name only when the block ends well. After an exception, an interrupt included,
    nothing is left behind and an earlier video of that name is untouched.

        with VideoWriter("out.mp4", 832, 480) as writer:
            for frames in chunks:
                writer.write(frames)

    path: ends in .mp4. width, height: of the frames to be written, in pixels. fps: frames per second.
    crf: quality, from 0 (lossless with x264) to 51; 18 looks like the original.
    scale: each pixel becomes a square of so many pixels; for models whose pictures are tiny.
    metadata: tags for the file, for example the prompt.
    encoder: one of `ENCODERS`. One that does not open here, as without such a GPU or with all of its sessions taken, gives way
        to x264, and `note` says so.

    The video is yuv420p in BT.709 colours, with its index in front (faststart), so that browsers can play it.
    A symbolic link is followed; a pipe or a device is refused. With x264 the same frames give the same file, byte
    for byte, on one machine, however busy it is.
    Raises ValueError for sizes that H.264 cannot hold and OSError for a path that cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        *,
        fps: float | Fraction = WAN_21.fps,
        crf: int = 18,
        scale: int = 1,
        metadata: dict[str, str] | None = None,
        encoder: str = PLAIN,
    ):
        self.path = Path(path)
        check_place(self.path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"the name of the video must end in .mp4, got {self.path.name!r}")
        if scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
        if width < 1 or height < 1 or width * scale % 2 or height * scale % 2:
            raise ValueError(f"H.264 video needs an even width and height, got {width * scale}x{height * scale} pixels")
        if max(width, height) * scale > H264_SIDE:
            raise ValueError(
                f"H.264 video is at most {H264_SIDE} pixels wide and high, got {width * scale}x{height * scale} pixels: "
                "make the video or its scale smaller"
            )
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be from 0 to 51, got {crf}")
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        if not 0.01 <= fps <= 1000:
            raise ValueError(f"fps must be from 0.01 to 1000, got {fps}")
        self.width, self.height, self.crf, self.scale = width, height, crf, scale
        self.fps = Fraction(fps).limit_denominator(1001)
        if encoder not in ENCODERS:
            raise ValueError(f"the encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
        self.metadata, self.encoder = dict(metadata or {}), encoder
        self.frames, self.note = 0, ""

    def __enter__(self) -> VideoWriter:
        with ExitStack() as ending:
            unfinished = ending.enter_context(replacing(self.path, what="video"))
            self._open(unfinished, FINISHED)
            ending.push(self._close)
            self._ending = ending.pop_all()
        return self

    def _open(self, place: Path, options: dict[str, str]) -> None:
        import av

        self._container = open_mp4(place, options, self.metadata)
        if self.encoder != PLAIN:
            try:
                self._stream = self._add_stream(ENCODERS[self.encoder])
                self._stream.codec_context.open(strict=False)
                return
            except (av.FFmpegError, ValueError) as error:  # the latter where FFmpeg was built without it
                why = getattr(error, "strerror", None) or str(error).splitlines()[0]
                self.note = (
                    f"the encoder {self.encoder} does not open here ({why}): it takes an NVIDIA GPU with a "
                    f"session to spare, and pictures of a size that it knows. The video is encoded with {PLAIN}"
                )
            logger.warning("%s", self.note)
            self.encoder = PLAIN
            self._container.close()
            self._container = open_mp4(place, options, self.metadata)
        self._stream = self._add_stream(ENCODERS[PLAIN])

    def _add_stream(self, encoder: Encoder) -> VideoStream:
        from av.video.reformatter import ColorRange

        options = {encoder.quality: str(self.crf), **encoder.options}
        stream = cast("VideoStream", self._container.add_stream(encoder.codec, rate=self.fps, options=options))
        stream.width, stream.height = self.width * self.scale, self.height * self.scale
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        if encoder.tag:
            codec.codec_tag = encoder.tag
        codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
        codec.color_range = ColorRange.MPEG
        return stream

    def write(self, frames: Tensor) -> None:
        """Append frames: floats [3, T, H, W] or [1, 3, T, H, W] in [-1, 1], or uint8 [T, H, W, 3]."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        for picture in self._pictures(frames):
            picture = picture.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1)
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def _pictures(self, frames: Tensor) -> Tensor:
        """The frames as uint8 [T, H, W, 3] in CPU memory."""
        given = f"{frames.dtype} {list(frames.shape)}"
        if frames.ndim == 5 and frames.shape[0] == 1:
            frames = frames[0]
        if frames.is_floating_point() and frames.ndim == 4:
            frames = to_uint8(frames).permute(1, 2, 3, 0)
        if frames.dtype != torch.uint8 or list(frames.shape[1:]) != [self.height, self.width, 3]:
            height, width = self.height, self.width
            raise ValueError(
                f"frames must be floats [3, T, {height}, {width}], with or without a batch dimension of 1, or "
                f"uint8 [T, {height}, {width}, 3]; got {given}"
            )
        return frames.cpu()

    def __exit__(self, *exception) -> None:
        self._ending.__exit__(*exception)

    def _close(self, kind, error, trace) -> None:
        with self._container:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        if not self.frames:
            raise ValueError(f"no frames were written to {self.path}")
        self._container.mux(self._stream.encode(None))


def open_mp4(place: Path, options: dict[str, str], metadata: dict[str, str]) -> OutputContainer:
    """An mp4 file to write to. options: of the muxer, `movflags` among them. metadata: tags for the file."""
    import av

    flags = options["movflags"] + ("+use_metadata_tags" if metadata else "")
    # A relative name with a colon in it would be taken for a protocol.
    container = av.open(os.path.abspath(place), "w", format="mp4", options=options | {"movflags": flags})
    container.metadata.update(metadata)
    return container


def to_uint8(frames: Tensor) -> Tensor:
    """Frames in [-1, 1] as uint8 from 0 to 255, shape unchanged."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class VideoInfo:
    """frames: pictures in the file. width, height: pixels. fps: frames per second. duration: seconds."""

    frames: int
    width: int
    height: int
    fps: float
    duration: float
    codec: str
    pix_fmt: str
    metadata: dict[str, str]


def read_video_info(path: str | Path) -> VideoInfo:
    """Describe the first video stream of a file; the frames are counted, not taken from the header."""
    import av

    with av.open(os.path.abspath(path)) as container:
        stream = container.streams.video[0]
        frames = sum(packet.size > 0 for packet in container.demux(stream))
        codec = stream.codec_context
        return VideoInfo(
            frames=frames,
            width=codec.width,
            height=codec.height,
            fps=float(stream.average_rate),
            duration=float(stream.duration * stream.time_base),
            codec=codec.name,
            pix_fmt=codec.pix_fmt,
            metadata=dict(container.metadata),
        )


def read_frames(path: str | Path) -> Tensor:
    """All frames of a video as uint8 [T, H, W, 3], by the colour tags of the file. For tests and benchmarks."""
    import av
    from av.video.reformatter import ColorRange

    with av.open(str(path)) as container:
        # PyAV before 18 heeds the tags only when it is told a range.
        frames = (f.reformat(format="rgb24", dst_color_range=ColorRange.JPEG) for f in container.decode(video=0))
        return torch.stack([torch.from_numpy(frame.to_ndarray()) for frame in frames])
