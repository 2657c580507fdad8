"""`python -m rolling_kv bench speeds`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse

from .. import options
from ..figures import hardware, machine, markdown, write_json
from .run import SpeedResult, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help="default: all that were recorded")
    parser.add_argument(
        "--videos", type=int, default=20, help="of the bundled model, at each speed (default: %(default)s)"
    )
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError for what cannot work, and outside of the source repository."""
    options.check(args)
    if args.videos < 0:
        raise ValueError(f"--videos takes a number from 0 on, got {args.videos}")
    with options.threads(args.threads):
        print(hardware(args.device), flush=True)
        results = measure(args.families, args.videos, str(args.device), lambda text: print(text, flush=True))
    print("\n" + "\n".join(table(results)))
    print("Products in float8 are PyTorch's own on every device; attention in 8 bits was imitated, see docs/speed.md.")
    if args.json:
        figures = [result._asdict() for result in results]
        write_json(args.json, {"machine": machine(args.device), "videos": args.videos, "speeds": figures})


def table(results: list[SpeedResult]) -> list[str]:
    looked = list(results[0].seen)
    rows = [
        [result.name, result.dtype, f"{result.median:.1e}", f"{result.largest:.1e} ({result.worst})"]
        + [f"{result.seen[name]:.3f}" for name in looked]
        for result in results
    ]
    return markdown(["speed", "dtype", "error, median", "error, largest", *looked], rows)
