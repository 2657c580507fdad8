"""FizzNodes' form: `"0": "a red circle", "24": "a blue circle"`, with the numbers of frames."""

from __future__ import annotations

import re

from ..messages import printable, shortened
from .prompts_json import load
from .schedule import PromptSchedule, Segment
from .segments import prompt_of, rising

NOTE = (
    "Read as FizzNodes' keyframes: frame numbers are divided by the model's frames per second, and each prompt holds until "
    "the next one, where FizzNodes blends them."
)


def is_keyframes(text: str) -> bool:
    """Whether the text begins with something quoted and a colon."""
    return re.match(r'"[^"\n]*"\s*:', text) is not None


def read_keyframes(text: str) -> PromptSchedule:
    """The prompts of such a text, held. Raises ValueError for what is computed in FizzNodes, and for no keyframes."""
    return of_keyframes(
        load("{" + text.rstrip().removesuffix(",") + "}", 'the schedule, keyframes `"0": "…", "24": "…"`')
    )


def of_keyframes(prompts: dict) -> PromptSchedule:
    """The prompts by the numbers of their frames, which are text."""
    segments, places = [], []
    for frame, text in sorted(prompts.items(), key=lambda item: (len(item[0].lstrip("0")), item[0])):
        where = f"frame {shortened(printable(frame), 40)}"
        if not re.fullmatch(r"[0-9]{1,9}", frame):
            raise ValueError(
                f'the schedule, {where}: a keyframe is the number of a frame, as in `"24": "a blue circle"`'
            )
        prompt = prompt_of(text, where)
        if "`" in prompt:
            raise ValueError(
                f"the schedule, {where}: expressions between ` are not computed here: write what comes of them"
            )
        if "--neg" in prompt:
            raise ValueError(
                f"the schedule, {where}: --neg has no place in a schedule: give the negative prompt where there is guidance"
            )
        segments.append(Segment(prompt, float(frame), "hold"))
        places.append((where, float(frame)))
    rising(places, "frame")
    return PromptSchedule(tuple(segments), "frames", notes=(NOTE,))
