"""`PromptSchedule`: which prompt a video has when, as a frozen value; and `Plan`, what of it falls on the chunks of a run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..config import SamplingConfig, check_choice, check_real, check_whole
from ..geometry import LONGEST_SECONDS, WAN_21, Geometry
from ..messages import shortened, shown

WORDS = ("hold", "recache", "flush", "cut")
"""What may be done to the cache when a prompt comes, in words for people."""
UNITS = ("seconds", "frames", "latent frames", "lengths", "shares")
ORIGINS = ("video", "run")

MOST_SEGMENTS = 1000
MOST_BLEND = 100
"""Chunks of a blend: each of them has an embedding of its own, which the video's log keeps."""
UNTIMED_CHUNKS = 14
"""Chunks of a segment without a length among others with one, as Infinity-RoPE has it."""

_FAR = 2**40
"""Chunks of no video."""


@dataclass(frozen=True)
class Segment:
    """One prompt of a schedule.

    text: the prompt.
    time: when it begins, in the schedule's unit; with the unit "lengths", for how many seconds it stays, or None for
        UNTIMED_CHUNKS chunks; with "shares", nothing.
    switch: what is done to the cache when it begins, one of WORDS; None: what the model's family does.
    blend: chunks over which the prompt before it becomes this one; 1: at once.
    curve: of the blend, "linear" or "slerp".
    """

    text: str
    time: float | None = None
    switch: str | None = None
    blend: int = 1
    curve: str = "linear"

    def __post_init__(self):
        object.__setattr__(self, "text", " ".join(self.text.split()))  # as the text encoder reads it
        if self.switch is not None:
            check_choice("the switch", self.switch, WORDS)
        check_whole("blend", self.blend, 1, MOST_BLEND, "chunk")
        check_choice("the curve of a blend", self.curve, ("linear", "slerp"))
        if self.blend > 1 and self.switch not in (None, "hold"):
            raise ValueError(f'a blend changes the prompt little by little, where a "{self.switch}" has no place')

    @property
    def at(self) -> float:
        """Its time, where the schedule's unit gives each one."""
        assert self.time is not None
        return self.time

    @property
    def words(self) -> str:
        """How it begins, in brackets, as the canonical form has it; empty for the family's own way."""
        if self.blend > 1:
            return f"[{'blend' if self.curve == 'linear' else 'slerp'} {self.blend}]"
        if self.switch is not None:
            return f"[{self.switch}]"
        return "[]" if self.text.endswith("]") else ""


@dataclass(frozen=True)
class PromptSchedule:
    """The prompts of a video, one after the other. `str()` of it is the canonical form where its unit is seconds.

    segments: in the order of time.
    unit: what their times count, one of UNITS. "seconds", "frames" and "latent frames" of the video; "lengths": the
        seconds of each segment, rounded down to whole chunks, as Infinity-RoPE does it; "shares": all last equally long.
    end: when the last one ends, in that unit; None where the length of the run decides.
    notes: what people should know about how it was read, as sentences.
    """

    segments: tuple[Segment, ...]
    unit: str = "seconds"
    end: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        check_choice("the unit of a schedule", self.unit, UNITS)
        if not self.segments:
            raise ValueError("a schedule needs at least one prompt")
        if len(self.segments) > MOST_SEGMENTS:
            raise ValueError(f"a schedule has at most {MOST_SEGMENTS:,} prompts, and this one {len(self.segments):,}")
        longest = LONGEST_SECONDS * (1 if self.unit in ("seconds", "lengths") else WAN_21.fps)
        last = None
        for number, segment in enumerate(self.segments, 1):
            if self.unit == "shares" or (self.unit == "lengths" and segment.time is None):
                continue
            check_real(f"the time of prompt {number}", segment.time, 0, longest)
            if self.unit == "lengths":
                continue
            if last is not None and segment.at <= last:
                raise ValueError(f"prompt {number} begins at {segment.at:g}, and the one before it at {last:g}")
            last = segment.at
        if self.end is not None:
            check_real("the end of the schedule", self.end, 0, longest)
            if last is None or self.end <= last:
                raise ValueError(f"the schedule ends at {self.end:g}, before its last prompt has begun")

    @classmethod
    def of(cls, prompt: str) -> PromptSchedule:
        """One prompt for all of a video."""
        return cls((Segment(prompt, 0.0),))

    def led_by(self, prompt: str) -> PromptSchedule:
        """This with another prompt before its first one. Raises ValueError unless there is time left for it."""
        if not self.begins_later:
            raise ValueError(
                "the schedule says from the beginning on which prompts there are: leave the other prompt out, or let the "
                f"schedule begin later, as in `2.5: {shortened(self.segments[0].text, 30)}`"
            )
        return replace(self, segments=(Segment(prompt, 0.0), *self.segments))

    @property
    def begins_later(self) -> bool:
        """Whether there is time before its first prompt."""
        return self.unit not in ("lengths", "shares") and bool(self.segments[0].time)

    @property
    def texts(self) -> tuple[str, ...]:
        """Its distinct prompts."""
        return tuple(dict.fromkeys(segment.text for segment in self.segments))

    @property
    def ends(self) -> bool:
        """Whether it says how long the video is."""
        if self.unit == "lengths":
            return all(segment.time is not None for segment in self.segments) and any(s.time for s in self.segments)
        return self.end is not None

    def __str__(self) -> str:
        lines = [f"{self._time(number)}{segment.text} {segment.words}" for number, segment in enumerate(self.segments)]
        if self.end is not None:
            lines.append(f"{_number(self.end)}: [end]")
        return "\n".join(line.rstrip() for line in lines)

    def _time(self, number: int) -> str:
        segment = self.segments[number]
        if self.unit == "shares":
            return f"part {number + 1} of {len(self.segments)}: "
        if self.unit == "lengths" and segment.time is None:
            return f"for {UNTIMED_CHUNKS} chunks: "
        time = _number(segment.at)
        return {"seconds": f"{time}: ", "lengths": f"for {time} s: "}.get(self.unit, f"{self.unit[:-1]} {time}: ")

    def chunks(
        self,
        sampling: SamplingConfig,
        geometry: Geometry = WAN_21,
        *,
        start_frame: int = 0,
        origin: str = "video",
        last: float | None = None,
    ) -> int:
        """Chunks that a run needs to come to the schedule's end, from `start_frame` on.

        last: seconds that its last prompt gets, where it has no end.

        Raises ValueError where the video is that long already, and without `last` for a schedule without an end.
        """
        grid = _Grid.of(sampling, geometry, start_frame, origin)
        first = grid.number_of(start_frame)
        frames = self._frames(sampling, geometry)
        if frames is None:
            if last is None:
                raise ValueError(
                    "the schedule does not say how long the video is: give a length, or a last line `10: [end]`"
                )
            begin = 0 if self.unit == "shares" else max(self._begins(grid, _FAR))
            return max(begin - first, 0) + sampling.chunks_for_seconds(last, start_frame, geometry)
        chunks = grid.chunks_for(frames) - first
        if chunks < 1:
            raise ValueError(
                f"the schedule ends after {geometry.seconds(frames):g} s, and the video is {geometry.seconds(start_frame):g} "
                "s long already: nothing is left to be made. Say how long it should be, or count times from this run on"
            )
        return chunks

    def _frames(self, sampling: SamplingConfig, geometry: Geometry) -> int | None:
        """Latent frames from its beginning to its end; None where it has none."""
        if self.unit == "lengths" and self.ends:
            seconds = sum(segment.at for segment in self.segments)
            return max(math.floor(seconds * geometry.fps) // geometry.temporal, sampling.chunk)
        if self.end is None:
            return None
        if self.unit == "latent frames":
            return math.ceil(self.end)
        seconds = self.end if self.unit == "seconds" else self.end / geometry.fps
        return geometry.latent_frames_for(seconds)

    def plan(
        self,
        sampling: SamplingConfig,
        geometry: Geometry = WAN_21,
        *,
        chunks: int,
        start_frame: int = 0,
        origin: str = "video",
    ) -> Plan:
        """What falls on the `chunks` chunks that a run makes from the latent frame `start_frame` on.

        A prompt begins with the first chunk that begins at its time or later. Where several would begin with one chunk,
        the last of them does.

        origin: from where times count: the beginning of the "video", or of the "run". Shares are always of the run.

        Raises ValueError where the run begins before the first prompt does.
        """
        check_choice("the origin of times", origin, ORIGINS)
        origin = "run" if self.unit == "shares" else origin
        grid = _Grid.of(sampling, geometry, start_frame, origin)
        first = grid.number_of(start_frame)
        begins: dict[int, Segment] = {}
        skipped, late = [], []
        for segment, number in zip(self.segments, self._begins(grid, first + chunks)):
            if number >= first + chunks:
                late.append(segment)
                continue
            if number in begins:
                skipped.append(begins[number])
            begins[number] = segment
        if min(begins, default=first + chunks) > first:
            raise ValueError(
                f"the schedule says nothing about the first {grid.seconds(min(begins, default=first + chunks)):g} s: begin "
                f"with `0: …`, the prompt that the video starts with"
            )
        later: dict[int, Segment] = {}
        if late:
            numbers = zip(self._begins(grid, _FAR), self.segments)
            later = {number: segment for number, segment in numbers if number >= first + chunks}
        frames = self._frames(sampling, geometry)
        end = None if frames is None else grid.chunks_for(frames)
        notes = list(self.notes)
        for segment in skipped:
            notes.append(f'Left out, as the next prompt begins with the same chunk: "{shortened(segment.text, 40)}".')
        if late:
            notes.append(
                f'Not reached in this run: "{shortened(late[0].text, 40)}"' + " and what follows." * (len(late) > 1)
            )
        return Plan(self, grid, first, chunks, tuple(begins.items()), tuple(notes), tuple(later.items()), end)

    def _begins(self, grid: _Grid, end: int) -> Iterator[int]:
        """The number of the chunk that each segment begins with; `end` or more for one that does not begin in time."""
        number = 0
        for index, segment in enumerate(self.segments):
            if self.unit == "lengths":
                yield number
                number += grid.chunks_in(segment.time)
            elif self.unit == "shares":
                yield math.ceil(index * end / len(self.segments))
            elif self.unit == "latent frames":
                yield bisect_left(range(end), math.ceil(segment.at), key=grid.frames)
            else:
                frame = segment.at * (grid.geometry.fps if self.unit == "seconds" else 1)
                yield bisect_left(range(end), frame - 1e-6, key=grid.pixel_frames)


class _Grid(NamedTuple):
    """Where chunks begin, numbered from where times count.

    base: the latent frame of chunk 0. size: of chunk 0; all others are `chunk` latent frames.
    """

    geometry: Geometry
    base: int
    size: int
    chunk: int

    @classmethod
    def of(cls, sampling: SamplingConfig, geometry: Geometry, start_frame: int, origin: str) -> _Grid:
        size = sampling.chunk_size(start_frame)
        if origin == "video" and start_frame:
            size = start_frame % sampling.chunk or sampling.chunk  # an odd remainder comes first
        return cls(geometry, start_frame if origin == "run" else 0, size, sampling.chunk)

    def frames(self, number: int) -> int:
        """Latent frames before chunk `number`, from the origin on."""
        return self.size + (number - 1) * self.chunk if number else 0

    def pixel_frames(self, number: int) -> int:
        """The same in frames of the video."""
        end = self.geometry.pixel_frames(self.base + self.frames(number))
        return end - self.geometry.pixel_frames(self.base)

    def seconds(self, number: int) -> float:
        """When chunk `number` begins, rounded down so little that it is still the first to begin then."""
        return math.floor(self.pixel_frames(number) / self.geometry.fps * 1e4) / 1e4

    def number_of(self, frame: int) -> int:
        """The number of the chunk that begins at an absolute latent frame."""
        frame -= self.base
        return 1 + (frame - self.size) // self.chunk if frame else 0

    def chunks_for(self, frames: int) -> int:
        """Chunks, from number 0 on, that hold so many latent frames."""
        return 1 + max(math.ceil((frames - self.size) / self.chunk), 0)

    def chunks_in(self, seconds: float | None) -> int:
        """Whole chunks in a segment of so many seconds, as Infinity-RoPE counts them."""
        if seconds is None:
            return UNTIMED_CHUNKS
        return max(int(seconds * self.geometry.fps / (self.geometry.temporal * self.chunk)), 1)


@dataclass(frozen=True)
class Plan:
    """What of a schedule falls on the chunks of one run.

    schedule: as it was read.
    grid: where chunks begin.
    first: number of the run's first chunk, counted from where times count.
    chunks: that the run makes.
    begins: the number of the chunk that a segment begins with, and the segment; those before the run's first too.
    notes: what people should know, as sentences.
    later: like `begins`, what begins after the run.
    end: the number of the first chunk after the schedule's end; None where it has none.
    """

    schedule: PromptSchedule
    grid: _Grid
    first: int
    chunks: int
    begins: tuple[tuple[int, Segment], ...]
    notes: tuple[str, ...] = ()
    later: tuple[tuple[int, Segment], ...] = ()
    end: int | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The distinct prompts that the run needs, those of blends included."""
        return tuple(dict.fromkeys(segment.text for _, segment in self.begins))

    def segments(self) -> Iterator[Segment | None]:
        """For each chunk from number 0 to the run's last: the segment that begins with it, or None."""
        begins = dict(self.begins)
        return (begins.get(number) for number in range(self.first + self.chunks))

    def snapped(self) -> PromptSchedule:
        """The schedule as it was understood: in seconds, each prompt at the beginning of its first chunk."""
        segments = [replace(segment, time=self.grid.seconds(number)) for number, segment in self.begins]
        last = self.first + self.chunks
        end = self.grid.seconds(last) if self.schedule.ends else None
        return PromptSchedule(tuple(segments), end=end, notes=self.notes)

    @property
    def origin(self) -> str:
        """From where the times of its schedule count, one of ORIGINS; a run that begins a video counts from both."""
        return "run" if self.grid.base else "video"

    def with_prompt(self, number: int, segment: Segment) -> Plan:
        """This with a prompt that begins with chunk `number`, in the place of what began there. What begins later stays."""
        begins = dict(self.begins) | {number: segment}
        return replace(self, begins=tuple((at, begins[at]) for at in sorted(begins)))

    def written(self, chunks: int | None = None) -> PromptSchedule:
        """The schedule that has this plan: as `snapped`, with what begins after the run.

        chunks: where the run ended after so many, and so does the schedule; None: it ends as planned.

        Raises ValueError for more prompts than a schedule has.
        """
        last, end = self.first + self.chunks, self.end
        if chunks is not None:
            end = self.first + chunks
        elif end is not None:
            end = max(end, last)
        begins = [(at, segment) for at, segment in (*self.begins, *self.later) if end is None or at < end]
        segments = tuple(replace(segment, time=self.grid.seconds(at)) for at, segment in begins)
        return PromptSchedule(segments, end=None if end is None else self.grid.seconds(end))


def _number(value: float) -> str:
    return shown(int(value)) if value == int(value) else f"{value:.6f}".rstrip("0")
