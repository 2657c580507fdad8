"""Steering from a terminal: lines that are typed while a video is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .messages import printable, shortened
from .sampling.steering import Steering


def listen(
    lines: Iterable[str],
    steering: Steering,
    say: Callable[[str], None],
    remark: Callable[[list[str]], str] = lambda prompts: "",
) -> None:
    """Tell a run what comes in lines, until there are no more.

    lines: each a prompt, which may end with brackets as in a schedule, or `/pause`, `/resume` or `/stop`.
    say: gets an answer to each. remark: what is to be said of the words of prompts, see `TextEncoder.remark`.
    """
    commands = {"/pause": steering.pause, "/resume": steering.resume, "/stop": steering.stop}
    answers = {"/pause": "paused behind this chunk", "/resume": "going on", "/stop": "this chunk is the last one"}
    for line in map(str.strip, lines):
        if not line:
            continue
        if line in commands:
            commands[line]()
            say(answers[line])
        elif line.startswith("/"):
            say(
                f"{shortened(printable(line), 40)} is none of {', '.join(commands)}; a prompt does not begin with a slash"
            )
        else:
            try:
                prompt = steering.prompt(line)
            except ValueError as error:
                say(str(error))
            else:
                say(f"from the next chunk on: {printable(prompt)}. {remark([prompt])}".rstrip())
