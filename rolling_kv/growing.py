"""A video file that plays while it grows, and becomes an ordinary one at the end."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .atomic import replacing
from .video import ENCODERS, FINISHED, VideoWriter, open_mp4

FRAGMENTED = {
    "movflags": "+empty_moov+default_base_moof",
    "frag_duration": "500000",  # microseconds
    "flush_packets": "1",
}
"""Options of an mp4 in fragments: each is whole once it is written, and what comes before it plays."""


def growing_place(path: str | Path) -> Path:
    """Where a video lies while it grows."""
    return Path(path).with_suffix(".growing.mp4")


class GrowingVideo(VideoWriter):
    """Writes frames as `VideoWriter` does, into a file that plays from its first frames on, whatever ends the process.

    A context manager. The file lies beside its place as NAME.growing.mp4 and stays there when the block ends, however it
    ends; then `finish` makes the video of it, or `discard` removes it. An earlier video of the name is untouched until then.

        with GrowingVideo("out.mp4", 832, 480) as video:
            for frames in chunks:
                video.write(frames)
        video.finish()

    The finished video has the very packets that `VideoWriter` writes.
    """

    @property
    def growing(self) -> Path:
        """The file while it grows."""
        return growing_place(self.path)

    @property
    def place(self) -> Path:
        """Where the video is now: the growing file until it has its name."""
        return self.path if self._finished else self.growing

    def __enter__(self) -> GrowingVideo:
        self._finished = False
        try:
            self.growing.parent.mkdir(parents=True, exist_ok=True)
            if self.growing.is_symlink():  # what it leads to is not ours
                self.growing.unlink()
            self._open(self.growing, FRAGMENTED)
            self._container.start_encoding()
        except OSError as error:
            raise OSError(f"cannot write {self.growing}: {error.strerror}") from error
        return self

    def __exit__(self, kind, *exception) -> None:
        # What ended the block is what has to be told, not what comes of it here.
        with suppress(*(() if kind is None else (OSError, ValueError))), self._container:
            if self.frames:
                self._finish()

    def finish(self) -> Path:
        """Give the video its name and an index in front; returns its path.

        Where that cannot be done, on a full disk say, what is whole of the file takes the name as it is: it plays. Raises
        ValueError where no frame was written, and OSError where none came to the disk or the name cannot be taken: what is
        there then stays as it is.
        """
        if not self.frames:
            self.discard()
            raise ValueError(f"no frames were written to {self.path}")
        import av

        whole = whole_length(self.growing)
        if not whole:
            raise OSError(f"no frame of {self.path} is whole on the disk")
        try:
            self._reorder()
        except (OSError, av.FFmpegError):
            os.truncate(self.growing, whole)
            os.replace(self.growing, self.path)
        else:
            self.discard()
        self._finished = True
        return self.path

    def discard(self) -> None:
        """Remove what has grown."""
        self.growing.unlink(missing_ok=True)

    def _reorder(self) -> None:
        import av

        with replacing(self.path, what="video") as part, av.open(os.path.abspath(self.growing)) as source:
            with open_mp4(part, FINISHED, self.metadata) as container:
                stream = container.add_stream_from_template(source.streams.video[0])
                if tag := ENCODERS[self.encoder].tag:
                    stream.codec_context.codec_tag = tag
                offset = None
                for packet in source.demux(video=0):
                    if packet.dts is None or packet.is_corrupt:  # a full disk took a part of it
                        continue
                    offset = packet.pts if offset is None else offset
                    packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
                    packet.stream = stream
                    container.mux(packet)


def whole_length(path: Path) -> int:
    """Bytes of a fragmented mp4 up to the end of its last whole fragment."""
    whole, size = 0, path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while len(head := file.read(16)) >= 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if length == 1:  # the length proper follows
                length = int.from_bytes(head[8:16], "big")
            at += length
            if length < 8 or at > size:
                break
            if kind == b"mdat":
                whole = at
            file.seek(at)
    return whole
