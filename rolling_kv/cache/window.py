"""Which latent frame lives in which slot of a rolling cache. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """`count` consecutive frames of a chunk, from its frame `source` on, go to the slots from `slot` on."""

    source: int
    slot: int
    count: int


class FrameWindow:
    """Which latent frame lives in which slot. Integers only; frame indices are absolute, from the start of the video.

    A chunk is opened with `begin`, may be written any number of times (once per denoising step), and becomes part of
    the past with `commit`. The first slots belong to frames that never make room; behind them lies a ring.

    capacity: slots, one for each latent frame of the window.
    held: the first latent frames of the video, which keep their slots until `rearrange` or `restart` says otherwise.
    """

    def __init__(self, capacity: int, held: int = 0):
        self.capacity = capacity
        self.kept: Sequence[int] = range(held)  # frames that own the first slots, in their order, also those to come
        self.base = held  # the frame that was given the ring's first slot
        self.oldest = held  # the first frame of the ring that is still there
        self.end = 0  # frames committed so far = absolute index of the next frame
        self.open = 0  # frames of the chunk being made
        self.leaving = range(0)  # frames that have left to make room for the open chunk

    @property
    def ring(self) -> int:
        """Slots behind those of the kept frames."""
        return self.capacity - len(self.kept)

    def begin(self, frames: int) -> None:
        """Open a chunk of `frames` latent frames; the oldest frames beyond the window are forgotten now.

        Raises ValueError when the window cannot hold the kept frames and the chunk.
        """
        total = self.end + frames
        if total - self.oldest > self.ring < frames:
            raise ValueError(
                f"a chunk of {frames} latent frames does not fit a window of {self.capacity} with a sink of {len(self.kept)}"
            )
        oldest = max(self.oldest, total - self.ring)
        self.leaving = range(self.oldest, min(oldest, self.end))
        self.oldest = oldest
        self.open = frames

    def commit(self) -> None:
        """The open chunk becomes part of the past."""
        self.end += self.open
        self.open = 0

    @property
    def filled(self) -> int:
        """Slots in use, the open chunk included. Used slots are always the first ones."""
        total = self.end + self.open
        return self.kept_until(total) + min(max(0, total - self.oldest), self.ring)

    def kept_until(self, end: int) -> int:
        """Kept frames before the absolute frame `end`."""
        if isinstance(self.kept, range):
            return min(max(0, end - self.kept.start), len(self.kept))
        return sum(frame < end for frame in self.kept)

    def slot(self, frame: int) -> int:
        """The slot that an absolute latent frame is written to: a kept frame's own, for others a place in the ring."""
        if frame in self.kept:
            return self.kept.index(frame)
        return len(self.kept) + (frame - self.base) % self.ring

    def segments(self) -> list[Segment]:
        """Where the open chunk's frames go; more than one segment where the ring wraps around."""
        segments: list[Segment] = []
        source = 0
        while source < self.open:
            slot = self.slot(self.end + source)
            # Slots of frames to come run on from the kept ones into the ring, up to the buffer's end.
            count = min(self.open - source, self.capacity - slot)
            segments.append(Segment(source, slot, count))
            source += count
        return segments

    def frames(self) -> list[int]:
        """Absolute index of the frame in each used slot, the open chunk included."""
        total = self.end + self.open
        frames = [*self.kept[: self.kept_until(total)], *range(max(self.oldest, total - self.ring), total)]
        return sorted(frames, key=self.slot)

    def rearrange(self, kept: Sequence[int], oldest: int) -> list[tuple[int, int]]:
        """Between two chunks: let other frames keep the first slots, and forget what is neither kept nor in the new ring.

        kept: those frames, in the order of their slots; present ones, then frames to come if there are any.
        oldest: the first frame that stays in the ring.
        Returns the moves that bring each frame that stays to its new slot: (from slot, to slot) each.
        """
        staying = [frame for frame in kept if frame < self.end] + list(range(oldest, self.end))
        before = [self.slot(frame) for frame in staying]
        self.kept = kept
        if kept and kept[-1] >= self.end:  # frames to come run on from their slots into the ring
            oldest = kept[-1] + 1
        self.base = self.oldest = oldest
        return [(old, new) for old, new in zip(before, map(self.slot, staying)) if old != new]

    def restart(self, start: int, kept: Sequence[int]) -> None:
        """Go back to before the frame `start`, and hold nothing but those `kept` frames that are older."""
        self.kept = kept
        self.end, self.open, self.leaving = start, 0, range(0)
        self.base = self.oldest = max(start, kept[-1] + 1) if kept else start
