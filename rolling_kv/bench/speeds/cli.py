"""`python -m rolling_kv bench speeds`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...config import SPEEDS
from .. import options
from ..figures import hardware, machine, markdown, write_json
from .run import CHUNKS, SEED, SpeedResult, measure, speeds_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help="default: all that were recorded")
    parser.add_argument("--speeds", nargs="+", choices=SPEEDS, default=SPEEDS, help="only these (default: all)")
    parser.add_argument(
        "--videos", type=int, default=20, help="of the bundled model, at each speed (default: %(default)s)"
    )
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. What --json has of a run with the same settings is not measured again.

    Raises ValueError for what cannot work, and outside of the source repository.
    """
    options.check(args)
    if args.videos < 0:
        raise ValueError(f"--videos takes a number from 0 on, got {args.videos}")
    with options.threads(args.threads):
        print(hardware(args.device), flush=True)
        families = sorted(args.families)
        settings = {"families": families, "videos": args.videos, "chunks": CHUNKS, "seed": SEED}
        settings = {"machine": machine(args.device), **settings}
        known = {result.key: result for result in earlier(args.json, settings)}
        if known:
            print(f"{len(known)} speeds are in {args.json} already", flush=True)
        left = [speed for speed in speeds_of(args.speeds) if speed.key not in known]
        try:
            for result in measure(families, args.videos, str(args.device), lambda text: print(text, flush=True), left):
                known[result.key] = result
                if args.json:  # whatever ends the rest
                    write_json(args.json, settings | {"speeds": [result._asdict() for result in ordered(known)]})
        except KeyboardInterrupt:
            if not known:
                raise
    print("\n" + "\n".join(table(ordered(known))))
    print("Products in float8 are PyTorch's own on every device; attention in 8 bits was imitated, see docs/speed.md.")


def earlier(file: Path | None, settings: dict[str, Any]) -> list[SpeedResult]:
    """What a run with these settings has written; nothing where the file is another's, or there is none."""
    try:
        written = json.loads(file.read_text(encoding="utf-8")) if file else {}
        speeds = written.pop("speeds")
        return [SpeedResult(**speed) for speed in speeds] if written == settings else []
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []


def ordered(known: dict[tuple[str, str], SpeedResult]) -> list[SpeedResult]:
    return [known[speed.key] for speed in speeds_of(SPEEDS) if speed.key in known]


def table(results: list[SpeedResult]) -> list[str]:
    looked = list(results[0].seen)
    rows = [
        [result.name, result.dtype, f"{result.median:.1e}", f"{result.largest:.1e} ({result.worst})"]
        + [f"{result.seen[name]:.3f}" for name in looked]
        for result in results
    ]
    return markdown(["speed", "dtype", "error, median", "error, largest", *looked], rows)
