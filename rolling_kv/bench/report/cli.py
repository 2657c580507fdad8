"""`python -m rolling_kv bench report`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from .. import options
from ..figures import hardware, machine, markdown, write_json
from ..random_model import SIZES
from .parts import Part, parts_of
from .run import DONE, Outcome, run_parts

RESULT = "report.json"
MOST_MINUTES = 10000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together (default: %(default)g)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files of all parts")
    parser.add_argument("--size", choices=SIZES, help="shape of the model (default: 1.3B on CUDA, else tiny)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="a trial: as few turns as show that everything runs here; no figures"
    )
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print, the table last. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args)
    if not 0 < args.minutes <= MOST_MINUTES:
        raise ValueError(f"--minutes must be positive, and at most {MOST_MINUTES}, got {args.minutes:g}")
    size = args.size or ("1.3B" if args.device.type == "cuda" else "tiny")
    parts = chosen(parts_of(size, args.device.type, SIZES[size].window, args.quick), args.parts)
    args.out.mkdir(parents=True, exist_ok=True)
    with options.threads(args.threads):
        known = machine(args.device)
        print(f"{hardware(args.device)}; {len(parts)} parts in {args.minutes:g} minutes at most", flush=True)
    given = ["--device", str(args.device), *(["--threads", str(args.threads)] if args.threads else [])]
    outcomes: list[Outcome] = []

    def told(part: Part, outcome: Outcome) -> None:
        outcomes.append(outcome)
        for file in filter(None, (args.out / RESULT, args.json)):  # what is known so far, whatever ends the rest
            write_json(file, as_json(args, size, known, outcomes))
        print(f"  {outcome.name}: {said(part, outcome)} ({outcome.seconds:.0f} s)", flush=True)

    with suppress(KeyboardInterrupt):  # what is known so far is told all the same
        run_parts(parts, args.out, args.minutes * 60, given, told)
    print("\n" + "\n".join(table(parts, outcomes)))
    print(f"\nAll figures are in {args.out / RESULT}; what each part printed is beside it.")


def chosen(parts: list[Part], names: list[str] | None) -> list[Part]:
    """The parts of those names, in their order. Raises ValueError for names that no part has."""
    if unknown := set(names or ()) - {part.name for part in parts}:
        known = ", ".join(part.name for part in parts)
        raise ValueError(f"--parts takes names of {known}; got {', '.join(sorted(unknown))}")
    return [part for part in parts if names is None or part.name in names]


def said(part: Part, outcome: Outcome) -> str:
    """What counts of a part, in a line: what it measured, and why there is not more."""
    line = part.headline(outcome.figures) if outcome.figures is not None else ""
    return line if outcome.status == DONE else "; ".join(filter(None, [outcome.status, line]))


def table(parts: list[Part], outcomes: list[Outcome]) -> list[str]:
    rows = [
        [outcome.name, said(part, outcome).replace("|", "/"), f"{outcome.seconds:.0f}"]
        for part, outcome in zip(parts, outcomes)
    ]
    return markdown(["part", "result", "s"], rows)


def as_json(args: argparse.Namespace, size: str, known: dict, outcomes: list[Outcome]) -> dict:
    """Everything measured so far."""
    return {
        "machine": known,
        "size": size,
        "minutes": args.minutes,
        "quick": args.quick,
        "parts": [outcome._asdict() for outcome in outcomes],
    }
