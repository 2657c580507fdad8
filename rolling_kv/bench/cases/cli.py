"""`python -m rolling_kv bench cases`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .. import options
from ..figures import BenchError, hardware, machine, markdown, write_json

LIMIT = 1e-4
"""Largest difference of the latents that is rounding: matrix products round differently on each device."""


class CaseResult(NamedTuple):
    """name: family and recording. difference: largest one from the recorded latents, in exact passes; fast: in the usual ones."""

    name: str
    difference: float
    fast: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help="default: all that were recorded")
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises BenchError for a case that is further off than rounding makes it."""
    options.check(args)
    with options.threads(args.threads):
        print(hardware(args.device), flush=True)
        results = measure(args.families, str(args.device))
    rows = [[result.name, f"{result.difference:.1e}", f"{result.fast:.1e}"] for result in results]
    print("\n" + "\n".join(markdown(["case", "exact", "as usual"], rows)))
    if args.json:
        figures = [result._asdict() for result in results]
        write_json(args.json, {"machine": machine(args.device), "limit": LIMIT, "cases": figures})
    if off := [result.name for result in results if not result.difference <= LIMIT]:
        raise BenchError(f"{len(off)} of {len(results)} cases differ by more than {LIMIT:.0e}: {', '.join(off)}")


def measure(families: list[str], device: str) -> list[CaseResult]:
    """Make every case that was recorded in float32. Raises ValueError where there are no recordings."""
    results = []
    for case in recorded(families):
        expected = case.tensors["output"]
        off = [float((case.run(exact=exact, device=device).cpu() - expected).abs().max()) for exact in (True, False)]
        results.append(CaseResult(case.name, *off))
    return results


def recorded(families: list[str]) -> list[Any]:
    """The cases that were recorded in float32, of these families or of all. Raises ValueError where there are none."""
    support = Path(__file__).parents[3] / "tests" / "support"
    if not support.is_dir():
        raise ValueError("the recorded cases are part of the source repository only")
    sys.path.append(str(support))  # where they import each other from, as under pytest
    try:
        cases = importlib.import_module("cases")
    except ImportError as error:
        raise ValueError(
            f"the recorded cases cannot be read in {Path.cwd()}, run it in {support.parents[1]}: {error}"
        ) from error
    found = [case for case in cases.load_cases(*families) if case.dtype == "float32" and not case.quirk]
    if not found:
        raise ValueError(f"no case of {' or '.join(families)} was recorded")
    return found
