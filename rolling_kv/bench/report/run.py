"""Runs the parts of a report one after the other, each in a process of its own: whatever ends one costs nothing else."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.multiprocessing as processes

from .parts import Part, command_line

DONE = "done"
LEAST = 15.0
"""Seconds without which no part is begun: the imports alone take some."""
ENDING = 10.0
"""Seconds that a process gets to be gone once it was ended."""


class Outcome(NamedTuple):
    """What became of a part.

    command: as a person would run it. status: `DONE`, or a sentence. seconds: that its process took.
    figures: what it wrote; None where it did not come so far.
    """

    name: str
    command: str
    status: str
    seconds: float
    figures: dict[str, Any] | None


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    seconds: float,
    options: Sequence[str],
    told: Callable[[Part, Outcome], None],
) -> list[Outcome]:
    """Run parts until there is no time left.

    folder: for NAME.json and NAME.txt of each, which has what it printed. seconds: for all of them together.
    options: behind each command. told: is called after each part.
    """
    outcomes, end = [], time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        outcome = _run(part, folder, min(part.limit, left), options) if left >= LEAST else _left_out(part, options)
        outcomes.append(outcome)
        told(part, outcome)
    return outcomes


def _left_out(part: Part, options: Sequence[str]) -> Outcome:
    return Outcome(part.name, command_line([*part.command, *options]), "left out: no time was left", 0.0, None)


def _run(part: Part, folder: Path, limit: float, options: Sequence[str]) -> Outcome:
    figures, log = folder / f"{part.name}.json", folder / f"{part.name}.txt"
    figures.unlink(missing_ok=True)
    command, start = [*part.command, *options], time.monotonic()
    process = processes.get_context("spawn").Process(target=_work, args=([*command, "--json", str(figures)], str(log)))
    process.start()
    late = True
    try:
        process.join(limit)
        late = process.is_alive()
    finally:  # Ctrl-C ends it too
        process.kill()
        process.join(ENDING)
    written = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else None
    if late:
        status = f"ended after {limit:.0f} s"
    elif process.exitcode == 0:
        status = DONE
    elif process.exitcode and process.exitcode > 0:
        status = f"failed: {_last_line(log)}"
    else:
        status = f"crashed (signal {-(process.exitcode or 0)})"
    return Outcome(part.name, command_line(command), status, time.monotonic() - start, written)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:300] if lines else "it said nothing"


def _work(command: list[str], log: str) -> None:
    """In the process of a part: run a benchmark, and write all that it says, C libraries included, to a file."""
    with open(log, "w", encoding="utf-8", errors="backslashreplace") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    from ..cli import add_command  # it knows this module

    try:
        parser = argparse.ArgumentParser()
        add_command(parser.add_subparsers())
        args = parser.parse_args(["bench", *command])
        args.run(args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
