"""The form of this project: a line `2.5: a blue circle [cut]` for each prompt."""

from __future__ import annotations

import difflib
import re

from ..geometry import LONGEST_SECONDS
from ..messages import printable, shortened
from .infinity_rope import LENGTH
from .schedule import MOST_BLEND, MOST_SEGMENTS, WORDS, PromptSchedule, Segment
from .segments import EXAMPLE, prompt_of, rising, seconds_of

TIME = re.compile(
    r"\s{0,99}([+-]?[\d.,]{0,20}\d[\d.,]{0,20}(?:e[+-]?\d{1,9})?)\s{0,9}s?\s{0,9}:", re.ASCII | re.IGNORECASE
)
"""What a line begins with: a time and a colon."""

_SLASH = re.compile(r" ?/ (?=[\d.]{1,20} ?s? ?:)")
_BRACKETS = re.compile(r" ?\[([^\[\]]*)\]$")
_BLEND = re.compile(r"(blend|slerp)(?:\s+(\S+))?")
_END = "end"
_TYPED = "the prompt"
"""Where a prompt stands that stands in no schedule yet."""


def is_canonical(text: str) -> bool:
    """Whether the text begins with a time and a colon."""
    return TIME.match(text) is not None


def read_canonical(text: str) -> PromptSchedule:
    """The schedule that such lines say. Raises ValueError, with the line, for one that says nothing clear."""
    lines = [(number, " ".join(line.split())) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    parts = [(f"line {number}", line) for number, line in lines]
    if len(lines) == 1:
        pieces = _SLASH.split(lines[0][1])
        if len(pieces) > 1:
            parts = [(f"part {number}", piece) for number, piece in enumerate(pieces, 1)]
    if len(parts) > MOST_SEGMENTS + 1:
        raise ValueError(f"the schedule has {len(parts):,} lines, and at most {MOST_SEGMENTS:,} prompts are possible")
    segments, places, end = [], [], None
    for where, line in parts:
        if end is not None:
            raise ValueError(f"the schedule, {where}: [end] has to be the last line")
        time, rest = _time(where, line)
        words = _BRACKETS.search(rest)
        if words and words[1].strip().lower() == _END:
            if rest[: words.start()].strip():
                raise ValueError(
                    f"the schedule, {where}: [end] stands alone, after the time at which the video ends: `{time:g}: [end]`"
                )
            end = time
        else:
            segments.append(_segment(where, time, rest, words))
        places.append((where, time))
    if not segments:
        raise ValueError(f"the schedule has no prompt: write one a line, as in {EXAMPLE}")
    rising(places, "second")
    return PromptSchedule(tuple(segments), end=end)


def read_prompt(text: str, how: str = "") -> Segment:
    """One prompt, as a line of a schedule has it behind its time.

    how: what would stand in brackets behind it; without it the text may end with brackets of its own, as a line may.

    Raises ValueError for a text or a word that no schedule can have.
    """
    line = " ".join(f"{text} [{how}]".split() if how else text.split())
    try:
        _, rest = _time(_TYPED, f"0: {line}")
        return _segment(_TYPED, 0.0, rest, _BRACKETS.search(rest))
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"the schedule, {_TYPED}: ")) from None


def _time(where: str, line: str) -> tuple[float, str]:
    match = TIME.match(line)
    if match is None:
        raise ValueError(
            f"the schedule, {where}: there is no time before `{shortened(printable(line.strip()), 40)}`: write one prompt a "
            f"line, each after the second that it begins at, as in {EXAMPLE}"
        )
    written, rest = match[1], line[match.end() :]
    if written.startswith("-"):
        raise ValueError(f"the schedule, {where}: a time is not negative, got {shortened(written, 40)}")
    if minutes := re.match(r"(\d{1,2}(?:\.\d+)?)\s*(?::|\s|$)", rest):
        if rest[minutes.end(1) : minutes.end(1) + 1] == ":" or not rest[:1].isspace():
            seconds = seconds_of(written, where) * 60 + float(minutes[1])
            raise ValueError(
                f"the schedule, {where}: `{written}:{minutes[1]}` may be minutes or part of a prompt: write seconds, as in "
                f"`{seconds:g}: …`, or the time before it, as in `0: {written}:{minutes[1]} …`"
            )
    time = seconds_of(written, where)
    if time > LONGEST_SECONDS:
        raise ValueError(f"the schedule, {where}: a video lasts at most a year, and this begins after {time:g} seconds")
    if mixed := LENGTH.search(rest):
        raise ValueError(
            f"the schedule, {where}: `{mixed[0]}` is how long a prompt lasts in Infinity-RoPE's form, where no line begins "
            f"with a time. Leave one of them out: `{written}: …`, or `…{mixed[0]} | …`"
        )
    if "|" in rest and TIME.match(rest.split("|", 1)[1]):
        raise ValueError(
            f"the schedule, {where}: `|` does not stand between prompts that have a time: use a line for each"
        )
    return time, rest


def _segment(where: str, time: float, rest: str, words: re.Match | None) -> Segment:
    if words is None:
        return Segment(prompt_of(rest, where), time)
    prompt, word = prompt_of(rest[: words.start()], where), " ".join(words[1].lower().split())
    if words[1] == "":
        return Segment(prompt, time)
    if another := _BRACKETS.search(prompt):
        if another[1].strip().lower() in WORDS or _BLEND.fullmatch(another[1].strip().lower()):
            raise ValueError(
                f"the schedule, {where}: a prompt begins in one way, not in two: `{another[0].strip()}` and [{word}]"
            )
    if word in WORDS:
        return Segment(prompt, time, word)
    if blend := _BLEND.fullmatch(word):
        number = blend[2] or ""
        if not re.fullmatch(r"\d{1,9}", number) or not 2 <= int(number) <= MOST_BLEND:
            raise ValueError(
                f"the schedule, {where}: [{blend[1]}] needs the number of chunks that it goes over, from 2 to {MOST_BLEND}, as "
                f"in `[{blend[1]} 3]`"
            )
        return Segment(prompt, time, None, int(number), "linear" if blend[1] == "blend" else "slerp")
    known = [*WORDS, "blend 3", "slerp 3"]
    near = difflib.get_close_matches(word, [*known, "blend", "slerp"], 1)
    raise ValueError(
        f"the schedule, {where}: [{shortened(printable(word), 30)}] is none of {', '.join(f'[{name}]' for name in known)}: "
        + (f"write [{near[0]}]" if near else "choose one of them")
        + ", or, if it belongs to the prompt, [] behind it"
    )
