"""JSON and JSON lines with prompts and times: LongLive's, Daydream Scope's timelines, and plain lists."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..messages import listed, shown
from .schedule import WORDS, PromptSchedule, Segment
from .segments import prompt_of, rising

_TIMES = ("startTime", "start", "time")
_ENDS = ("endTime", "end")
_FORMS = (
    '`{"prompts": ["…", "…"], "times": [0, 2.5]}` in seconds, `[{"time": 0, "prompt": "…"}, …]`, LongLive\'s '
    '`{"prompts": ["…", "…"], "switch_frame_indices": [40]}` in latent frames, or a timeline of Daydream Scope'
)


def is_json(text: str) -> bool:
    """Whether the text begins as an object or a list of JSON does."""
    return re.match(r'\{|\[\s*([{"\]]|$)', text) is not None


def load(text: str, what: str = "the schedule, as JSON"):
    """The value of JSON. what: to call it in messages. Raises ValueError, with the line, for anything else."""
    try:
        return json.loads(text, strict=False, object_pairs_hook=_distinct, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{what}: it is nested too deeply to be a list of prompts") from None
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 5000 else names[:1]
        raise ValueError(f"{listed(twice)} stands there twice: each may stand there once")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def read_json(text: str) -> PromptSchedule:
    """The schedule in JSON, or in lines of which each is JSON. Raises ValueError for one that holds none."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for _, line in lines):
        values = [load(line, f"the schedule, JSON of line {number}") for number, line in lines]
        if any(isinstance(value.get("prompts"), (list, dict)) for value in values):
            raise ValueError(
                f"the schedule has {len(values)} lines with prompts each, the prompts of as many videos: keep one"
            )
        return _of_entries(values, [f"line {number}" for number, _ in lines])
    return _of_value(load(text))


def _of_value(value) -> PromptSchedule:
    if isinstance(value, dict):
        if value and all(re.fullmatch("[0-9]+", key) for key in value):
            from .keyframes import of_keyframes

            return of_keyframes(value)
        if "prompts" not in value and not _first(value, "prompt", "text"):
            raise ValueError(
                f'the schedule, as JSON: it has no "prompts", but {listed(value) or "nothing"}. Write {_FORMS}'
            )
        prompts = value.get("prompts", [value])
        if isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts):
            return _of_texts(prompts, value)
    else:
        prompts = value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(
            f"the schedule, as JSON: its prompts must be a list of at least one, got {shown(prompts)}. Write {_FORMS}"
        )
    places = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    if all(isinstance(prompt, str) for prompt in prompts):
        return _of_texts(prompts, {})
    return _of_entries(prompts, places)


def _of_texts(texts: Sequence[str], around: dict) -> PromptSchedule:
    """Prompts, with their times beside them. around: the object that they are in."""
    prompts = [prompt_of(text, f"prompt {number}") for number, text in enumerate(texts, 1)]
    if "times" in around and "switch_frame_indices" in around:
        raise ValueError(
            'the schedule, as JSON: "times" and "switch_frame_indices" say the same twice: keep one of them'
        )
    if "times" in around:
        times, unit, end = around["times"], "seconds", _first(around, *_ENDS, "seconds")
        if not isinstance(times, list) or len(times) != len(prompts):
            raise ValueError(
                f'the schedule, as JSON: "times" must be a list of {len(prompts)} seconds, one for each prompt'
            )
    elif "switch_frame_indices" in around:
        times, unit, end = around["switch_frame_indices"], "latent frames", around.get("num_output_frames")
        if isinstance(times, str):  # as its settings have them
            times = [int(part) if re.fullmatch(r"\s*[0-9]{1,9}\s*", part) else part for part in times.split(",")]
        if not isinstance(times, list) or len(times) != len(prompts) - 1:
            raise ValueError(
                f'the schedule, as JSON: "switch_frame_indices" must be a list of {len(prompts) - 1} latent frames, one for '
                "each prompt but the first"
            )
        times = [0, *times]
    else:
        notes = ("Each prompt lasts an equal share of the run.",) if len(prompts) > 1 else ()
        return PromptSchedule(tuple(map(Segment, prompts)), "shares", notes=notes)
    places = [(f"prompt {n}", _number(time, f"the time of prompt {n}")) for n, time in enumerate(times, 1)]
    rising(places, unit.removesuffix("s"))
    end = None if end is None else _number(end, "its end")
    return PromptSchedule(tuple(Segment(prompt, time) for prompt, (_, time) in zip(prompts, places)), unit, end)


def _of_entries(entries: Sequence, places: Sequence[str]) -> PromptSchedule:
    """Prompts that are objects, with or without a time each. places: where they stand."""
    segments, times, end = [], [], None
    for where, entry in zip(places, entries):
        if not isinstance(entry, dict):
            raise ValueError(
                f"the schedule, {where}: expected an object with a prompt and a time, got {shown(entry)}. Write {_FORMS}"
            )
        time = _first(entry, *_TIMES)
        time = None if time is None else _number(time, f"the time of {where}")
        segments.append(_segment(entry, where, time, first=not segments))
        if time is not None:
            times.append((where, time))
        end = _first(entry, *_ENDS)
    if not times:
        return PromptSchedule(tuple(segments), "shares", notes=("Each prompt lasts an equal share of the run.",))
    if len(times) < len(segments):
        missing = next(where for where, segment in zip(places, segments) if segment.time is None)
        raise ValueError(f'the schedule, {missing}: it has no time, and others have one: add `"time": 2.5`, in seconds')
    rising(times, "second")
    end = None if end is None else _number(end, f"the end of {places[-1]}")
    return PromptSchedule(tuple(segments), end=end)


def _segment(entry: dict, where: str, time: float | None, first: bool) -> Segment:
    text = _first(entry, "prompt", "text", "prompts")
    if isinstance(text, list):
        if len(text) != 1:
            raise ValueError(
                f"the schedule, {where}: it mixes {len(text)} prompts, and a chunk is made with one: keep one of them, or write "
                "both into one prompt"
            )
        text = text[0].get("text") if isinstance(text[0], dict) else text[0]
    switch = entry.get("switch")
    if switch is not None and (not isinstance(switch, str) or switch not in WORDS):
        raise ValueError(f"the schedule, {where}: the switch must be one of {', '.join(WORDS)}, got {shown(switch)}")
    blend = _first(entry, "transitionSteps", "blend") or 1
    curve = _first(entry, "temporalInterpolationMethod", "curve") or "linear"
    prompt = prompt_of(text, where)
    try:
        # A timeline may begin with a transition, from the prompt of the one before it.
        return Segment(prompt, time, switch, 1 if first else blend, curve)
    except ValueError as error:
        raise ValueError(f"the schedule, {where}: {error}") from None


def _first(entry: dict, *names: str):
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _number(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise ValueError(f"the schedule, as JSON: {what} must be a number that is not negative, got {shown(value)}")
    return float(value)
