"""Infinity-RoPE's form: `p1[5s] | p2[10s#]`, read as its own parser does; and prompts between bars, without any length."""

from __future__ import annotations

import re

from ..messages import printable, shortened
from .schedule import UNTIMED_CHUNKS, PromptSchedule, Segment
from .segments import prompt_of, seconds_of

LENGTH = re.compile(r"\[(\d{1,12}\.?\d{0,12})\s{0,9}s#?\]", re.ASCII)
"""How long a segment lasts; everything else in brackets stays in the prompt."""

_NEARLY = re.compile(
    r"\[\s{0,9}\d{0,12}[.,]?\d{1,12}\.?\s{0,9}s(?:ec(?:onds?)?)?\s{0,9}#?\s{0,9}\]", re.ASCII | re.IGNORECASE
)


def looks_timed(text: str) -> bool:
    """Whether something in the text looks like a length, read as one or not."""
    return _NEARLY.search(text) is not None


def read_lengths(text: str) -> PromptSchedule:
    """Segments with lengths. A `#` anywhere in one makes what follows it begin with a cut.

    What follows a `;`, subtitles, is left out. Only the first length of a segment counts, and all are cut out.
    """
    notes = ["Read as Infinity-RoPE's form: lengths are rounded down to chunks, and # ends its own segment with a cut."]
    text, semicolon, _ = text.partition(";")
    if semicolon:
        notes.append("Left out, as subtitles: everything from the ; on.")
    segments, cut = [], False
    for number, part in enumerate(text.split("|"), 1):
        where = f"segment {number}"
        length = LENGTH.search(part)
        prompt = prompt_of(LENGTH.sub("", part), where)
        if nearly := _NEARLY.search(prompt):
            notes.append(
                f"In {where}, {shortened(printable(nearly[0]), 40)} is part of the prompt and no length; a length is written "
                f"[5s]."
            )
        if length is None:
            notes.append(f"{where.capitalize()} has no length and lasts {UNTIMED_CHUNKS} chunks.")
        time = None if length is None else seconds_of(length[1], where)
        segments.append(Segment(prompt, time, "cut" if cut else None))
        cut = "#" in part
    return PromptSchedule(tuple(segments), "lengths", notes=tuple(notes))


def read_shares(text: str) -> PromptSchedule:
    """Prompts between bars, of which each lasts equally long."""
    parts = text.split("|")
    segments = [Segment(prompt_of(part, f"segment {number}")) for number, part in enumerate(parts, 1)]
    return PromptSchedule(tuple(segments), "shares", notes=("Each prompt lasts an equal share of the run.",))
