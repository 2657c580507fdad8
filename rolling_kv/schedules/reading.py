"""Reading a schedule: the shape of a text tells whose form it is, without an option."""

from __future__ import annotations

import re
from pathlib import Path

from ..messages import printable, shortened
from .canonical import TIME, is_canonical, read_canonical
from .infinity_rope import LENGTH, looks_timed, read_lengths, read_shares
from .keyframes import is_keyframes, read_keyframes
from .prompts_json import is_json, read_json
from .schedule import PromptSchedule, Segment
from .segments import EXAMPLE, prompt_of

MOST_CHARACTERS = 200_000
"""Of a whole schedule."""


def read_schedule(text: str) -> PromptSchedule:
    """The schedule that a text says, in any of these forms.

    The canonical one: a line `2.5: a blue circle [cut]` for each prompt, with the second that it begins at, and in brackets
        how: `[hold]`, `[recache]`, `[flush]`, `[cut]`, `[blend 3]` or `[slerp 3]` over so many chunks; without any, in the
        way of the model's family. `[]` ends a prompt that has brackets at its own end; `10: [end]` is the end. On one line,
        ` / ` stands between prompts.
    Infinity-RoPE's: `a[5s] | b[10s#]`, where `#` ends its own segment with a cut; and `a | b`, in equal shares of the run.
    FizzNodes': `"0": "a", "24": "b"`, with frame numbers.
    JSON or JSON lines with `prompts`: LongLive's and Daydream Scope's, or a list of prompts with times.
    One prompt on one line.

    Raises ValueError, with the line and what to write instead, for text in none of these forms or in several.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a schedule has at most {MOST_CHARACTERS:,} characters, and this one {len(text):,}")
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise ValueError(f"the schedule is empty: write one prompt a line, as in {EXAMPLE}")
    if is_json(text):
        return read_json(text)
    if is_keyframes(text):
        return read_keyframes(text)
    if is_canonical(text):
        return read_canonical(text)
    lines = [line for line in text.splitlines() if line.strip()]
    timed = next((number for number, line in enumerate(lines, 1) if TIME.match(line)), None)
    if timed is not None:
        raise ValueError(
            f"the schedule, line {timed}, begins with a time, and line 1 does not: begin every line with one, as in "
            f"`0: {shortened(printable(lines[0].strip()), 40)}`"
        )
    if LENGTH.search(text) or ("|" in text and looks_timed(text)):
        return read_lengths(text)
    if "|" in text:
        return read_shares(text)
    if len(lines) > 1:
        raise ValueError(
            f"the schedule has {len(lines)} lines without a time: write one before each, as in {EXAMPLE}, put ` | ` between "
            "prompts that last equally long, or write one prompt on one line"
        )
    return PromptSchedule((Segment(prompt_of(text, "line 1"), 0.0),))


def load_schedule(path: str | Path) -> PromptSchedule:
    """The schedule in a text file. Raises ValueError for one that is not UTF-8, or as `read_schedule` does."""
    path = Path(path)
    with path.open("rb") as file:
        content = file.read(4 * MOST_CHARACTERS + 1)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(content) <= 4 * MOST_CHARACTERS:
            raise ValueError(
                f"the schedule {printable(str(path))} is not UTF-8 text (byte {error.start}): save it as UTF-8"
            ) from None
        text = content.decode("utf-8", "replace")
    return read_schedule(re.sub("\r\n?", "\n", text))
