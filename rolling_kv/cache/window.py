"""Which latent frame lives in which slot of a rolling cache. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """`count` consecutive frames of a chunk, from its frame `source` on, go to the slots from `slot` on."""

    source: int
    slot: int
    count: int


class Rearranged(NamedTuple):
    """What other frames in the first slots mean for the buffers.

    moves: (from slot, to slot) of each frame that stays and moves.
    sources: for each kept frame that is there already, its place among those kept before, if it was, and its old slot.
    """

    moves: list[tuple[int, int]]
    sources: list[tuple[int | None, int]]


class FrameWindow:
    """Which latent frame lives in which slot. Integers only; frame indices are absolute, from the start of the video.

    A chunk is opened with `begin`, may be written any number of times (once per denoising step), and becomes part of
    the past with `commit`. The first slots belong to frames that never make room; behind them lies a ring.

    capacity: slots, one for each latent frame of the window.
    sink: the first latent frames of the video, which keep their slots until a switch says otherwise.
    memory: slots behind the sink that never make room either.
    unlimited: whether the capacity grows with the video, so that no frame ever leaves and none has to be held.
    """

    def __init__(self, capacity: int, sink: int = 0, memory: int = 0, unlimited: bool = False):
        self.capacity = capacity
        self.sink = sink
        self.held = 0 if unlimited else sink + memory
        self.unlimited = unlimited
        self.kept: Sequence[int] = range(
            self.held
        )  # frames that own the first slots, in their order, also those to come
        self.base = self.held  # the frame that was given the ring's first slot
        self.oldest = self.held  # the first frame of the ring that is still there
        self.end = 0  # frames committed so far = absolute index of the next frame
        self.open = 0  # frames of the chunk being made
        self.leaving = range(0)  # frames that have left to make room for the open chunk
        self.shot: range | None = None  # the current shot's first frames, to be kept once they would leave

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

    # Between two chunks.

    def rearrange(self, kept: Sequence[int], oldest: int) -> Rearranged:
        """Let other frames keep the first slots, and forget what is neither kept nor in the new ring.

        kept: those frames, in the order of their slots; present ones, then frames to come if there are any.
        oldest: the first frame that stays in the ring.
        """
        had = {frame: index for index, frame in enumerate(self.kept[: self.kept_until(self.end)])}
        staying = [frame for frame in kept if frame < self.end] + list(range(oldest, self.end))
        before = [self.slot(frame) for frame in staying]
        sources = [(had.get(frame), slot) for frame, slot in zip(kept, before) if frame < self.end]
        self.kept = kept
        if kept and kept[-1] >= self.end:  # frames to come run on from their slots into the ring
            oldest = kept[-1] + 1
        self.base = self.oldest = oldest
        return Rearranged([move for move in zip(before, map(self.slot, staying)) if move[0] != move[1]], sources)

    def flush(self) -> Rearranged | None:
        """Forget all but the first frame of the sink and the last two; None where there are no others."""
        first = self.sink_frames()[:1]
        held = [*self.kept[: self.kept_until(self.end)], *range(self.oldest, self.end)]
        if len(held) <= len(first) + 2:
            return None
        staying = [*first, *held[-2:]]
        kept = staying[: self.sink]
        if not self.unlimited:
            kept += range(self.end, self.end + self.sink - len(kept))
        self.shot = None
        return self.rearrange(kept, staying[self.sink] if self.sink < len(staying) else self.end)

    def drop_to_sink(self) -> Rearranged:
        """Forget all but the sink, an open chunk included."""
        self.open, self.shot = 0, None
        return self.rearrange(self.sink_frames() if self.unlimited else self.kept[: self.sink], self.end)

    def keep_shot(self, start: int, frames: int) -> None:
        """Keep the first of `frames` frames from `start` on, as many as the sink has, until another shot is kept."""
        self.shot = range(start, start + min(self.sink, frames)) or None

    def place_shot(self, frames: int) -> list[Rearranged]:
        """Before a chunk of `frames`: keep the shot's first frames if they would leave, and an older shot's no more."""
        done: list[Rearranged] = []
        total, shot = self.end + frames, self.shot
        if shot is None or shot[0] in self.kept:
            return done
        if len(self.kept) > self.sink:
            done.append(self.rearrange(self.kept[: self.sink], max(self.oldest, total - (self.capacity - self.sink))))
        if total - self.ring > shot[0]:
            if shot[0] < self.oldest or self.ring - len(shot) < frames:
                self.shot = None  # in the sink already, or there is no room for it
            else:
                oldest = max(shot[-1] + 1, total - (self.ring - len(shot)))
                done.append(self.rearrange([*self.kept, *shot], oldest))
        return done

    def restart(self, at: int, keep_sink: bool) -> bool:
        """Go back to before the frames that a window at the latent frame `at` holds, so that they are written anew.

        keep_sink: whether the kept frames stay where they are older than the window's rest. Otherwise the first frames
            that are written become the sink.
        Returns whether they stay.
        """
        if self.shot and self.shot[0] not in self.kept:  # a new shot has begun: an older one's frames are free
            self.kept = self.kept[: self.sink]
        ring_start = at - self.ring
        stay = bool(
            keep_sink and not self.unlimited and at > self.capacity and self.kept and self.kept[-1] < ring_start
        )
        if not stay:
            ring_start = 0 if self.unlimited else max(0, at - self.capacity)
            self.kept = range(ring_start, ring_start + self.held)
        self.end, self.open, self.leaving, self.shot = ring_start, 0, range(0), None
        self.base = self.oldest = ring_start if stay else ring_start + self.held
        return stay

    def sink_frames(self) -> Sequence[int]:
        """The sink's frames, as far as there are any yet."""
        if self.unlimited and not self.kept:
            return range(min(self.sink, self.end))
        return self.kept[: min(self.sink, self.kept_until(self.end))]
