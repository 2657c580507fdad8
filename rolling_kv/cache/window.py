"""Which latent frame lives in which slot of a rolling cache. Integers only."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """`count` consecutive frames of a chunk, from its frame `source` on, go to the slots from `slot` on."""

    source: int
    slot: int
    count: int


class FrameWindow:
    """Which latent frame lives in which slot. Integers only; frame indices are absolute, from the start of the video.

    A chunk is opened with `begin`, may be written any number of times (once per denoising step), and becomes part of
    the past with `commit`.

    capacity: slots, one for each latent frame of the window.
    sink: the first latent frames of the video, which keep their slots for ever.
    """

    def __init__(self, capacity: int, sink: int = 0):
        self.capacity = capacity
        self.sink = sink
        self.end = 0  # frames committed so far = absolute index of the next frame
        self.open = 0  # frames of the chunk being made

    def begin(self, frames: int) -> None:
        """Open a chunk of `frames` latent frames; the oldest frames beyond the window are forgotten now.

        Raises ValueError when the window cannot hold the sink and the chunk.
        """
        if self.end + frames > self.capacity and self.sink + frames > self.capacity:
            raise ValueError(
                f"a chunk of {frames} latent frames does not fit a window of {self.capacity} with a sink of {self.sink}"
            )
        self.open = frames

    def commit(self) -> None:
        """The open chunk becomes part of the past."""
        self.end += self.open
        self.open = 0

    @property
    def filled(self) -> int:
        """Slots in use, the open chunk included. Used slots are always the first ones."""
        return min(self.end + self.open, self.capacity)

    def slot(self, frame: int) -> int:
        """The slot that an absolute latent frame is written to: a sink frame's own, for others a place in the ring."""
        if frame < self.sink:
            return frame
        return self.sink + (frame - self.sink) % (self.capacity - self.sink)

    def segments(self) -> list[Segment]:
        """Where the open chunk's frames go; more than one segment where the ring wraps around."""
        segments: list[Segment] = []
        source = 0
        while source < self.open:
            slot = self.slot(self.end + source)
            # Slots run on from the sink into the ring, up to the buffer's end.
            count = min(self.open - source, self.capacity - slot)
            segments.append(Segment(source, slot, count))
            source += count
        return segments

    def frames(self) -> list[int]:
        """Absolute index of the frame in each used slot, the open chunk included."""
        end = self.end + self.open
        frames = list(range(min(end, self.sink)))
        frames += range(max(self.sink, end - (self.capacity - self.sink)), end)
        return sorted(frames, key=self.slot)
