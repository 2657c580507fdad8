"""A schedule as an editor shows it: what every form says in seconds, and where chunks begin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ..config import SamplingConfig, check_real
from ..geometry import LONGEST_SECONDS, WAN_21, Geometry
from .canonical import is_canonical
from .reading import read_schedule
from .schedule import PromptSchedule

LAST_SECONDS = 5.0
"""What the last prompt of a schedule without an end gets in what is shown."""
MOST_GRID, AHEAD = 2000, 32
"""Chunks that are listed at most, and how many beyond what is shown; all later ones last as long as the last of these."""


class Shown(NamedTuple):
    """A schedule in seconds.

    schedule: in seconds. One that was in seconds already has the times that are written there.
    canonical: whether the text is in the canonical form.
    grid: seconds at which chunks begin, of those that are shown and of some behind them.
    seconds: how long what is shown is.
    notes: what people should know about how it was read, as sentences.
    """

    schedule: PromptSchedule
    canonical: bool
    grid: tuple[float, ...]
    seconds: float
    notes: tuple[str, ...]

    def about(self) -> dict[str, Any]:
        """All of it as JSON: "canonical" is the text in this project's form, "how" what stands in the brackets."""
        segments = self.schedule.segments
        return {
            "canonical": str(self.schedule),
            "is_canonical": self.canonical,
            "segments": [{"text": one.text, "time": one.at, "how": one.words.strip("[]")} for one in segments],
            "end": self.schedule.end,
            "notes": list(self.notes),
            "grid": list(self.grid),
            "seconds": self.seconds,
        }


def shown_in_seconds(
    text: str, sampling: SamplingConfig, geometry: Geometry = WAN_21, seconds: float | None = None
) -> Shown:
    """What a text of any form says for a video that begins at 0.

    seconds: how long the run is, where that is known; it decides about shares, and about what has no end.

    Raises ValueError as `read_schedule` does.
    """
    if seconds is not None:
        check_real("seconds", seconds, 0, LONGEST_SECONDS)
    schedule = read_schedule(text)
    whole = schedule.led_by(" ") if schedule.begins_later else schedule
    chunks = whole.chunks(sampling, geometry, last=LAST_SECONDS)
    if seconds and not schedule.ends:
        run = sampling.chunks_for_seconds(seconds, geometry=geometry)
        chunks = run if schedule.unit == "shares" else max(run, chunks)
    plan = whole.plan(sampling, geometry, chunks=chunks)
    starts = tuple(plan.grid.seconds(number) for number in range(min(chunks + AHEAD, MOST_GRID)))
    length = plan.grid.seconds(chunks)
    if schedule.unit == "seconds":
        return Shown(schedule, is_canonical(text.removeprefix("\ufeff").strip()), starts, length, plan.notes)
    snapped = plan.snapped()
    if whole is not schedule:
        snapped = replace(snapped, segments=snapped.segments[1:])
    return Shown(snapped, False, starts, length, plan.notes)
