"""What the readers of all forms share: how a prompt and a number are checked, and how an example looks."""

from __future__ import annotations

import re

from ..messages import printable, shortened, shown

EXAMPLE = "`2.5: a blue circle [cut]`"
MOST_PROMPT = 10_000
"""Characters of a prompt; the models read 512 tokens of it."""

_NUMBER = re.compile(r"\d{1,12}(\.\d{0,12})?|\.\d{1,12}")


def prompt_of(text: object, where: str) -> str:
    """A prompt, in one line. where: it stands. Raises ValueError for anything that no prompt is."""
    if not isinstance(text, str):
        raise ValueError(f"the schedule, {where}: a prompt must be text, got {shown(text)}")
    prompt = " ".join(text.split())
    if not prompt:
        raise ValueError(f"the schedule, {where}: there is no prompt: write one, as in {EXAMPLE}")
    if len(prompt) > MOST_PROMPT:
        raise ValueError(
            f"the schedule, {where}: a prompt has at most {MOST_PROMPT:,} characters, and this one {len(prompt):,}"
        )
    for character in prompt:
        if not character.isprintable() and character.isascii() or "\ud800" <= character <= "\udfff":
            raise ValueError(
                f"the schedule, {where}: the prompt has {ascii(character)} in it, which is no character to read: delete it"
            )
    return prompt


def seconds_of(text: str, where: str) -> float:
    """A number of seconds. Raises ValueError for text that is none."""
    if not _NUMBER.fullmatch(text):
        better = text.replace(",", ".")
        hint = f"write `{better}`" if _NUMBER.fullmatch(better) else f"write seconds, as in {EXAMPLE}"
        raise ValueError(f"the schedule, {where}: {shortened(printable(text), 40)} is no number of seconds: {hint}")
    return float(text)


def rising(times: list[tuple[str, float]], unit: str) -> None:
    """Raise ValueError unless times rise. times: of each prompt, and where it stands."""
    for (before, earlier), (where, later) in zip(times, times[1:]):
        if later <= earlier:
            raise ValueError(
                f"the schedule, {where}: it begins at {unit} {later:g}, and {before} at {earlier:g}: put prompts in the order "
                "of time, each at one of its own"
            )
