"""`python -m rolling_kv bench streams`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse

from .. import options
from ..figures import hardware, machine, markdown, write_json
from ..random_model import SIZES, random_model
from .run import Measured, StreamsExperiment, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="mid", help="shape of the model (default: %(default)s)")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 2, 4], help="videos side by side (default: 1 2 4)"
    )
    parser.add_argument("--height", type=int, help="pixels (default: the size's)")
    parser.add_argument("--width", type=int, help="pixels (default: the size's)")
    parser.add_argument("--chunks", type=int, default=4, help="of each video (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="timed turns (default: %(default)s)")
    options.add_dtype(parser)
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "chunks", "repeats")
    if min(args.streams) < 1:
        raise ValueError(f"--streams must be at least 1, got {min(args.streams)}")
    size = SIZES[args.size]
    with options.threads(args.threads):
        height, width = args.height or size.height, args.width or size.width
        model = random_model(args.size, options.dtype_of(args), args.device)
        experiment = StreamsExperiment(model, height, width, args.chunks, tuple(args.streams), args.repeats)
        print(f"{args.size}: {size.describe()}; {height}x{width}, {args.chunks} chunks each\n{hardware(args.device)}")
        results = measure(experiment, say=lambda text: print(f"  {text}", flush=True))
        print("\n" + "\n".join(table(results)))
        if args.json:
            figures = [found._asdict() for found in results]
            write_json(args.json, {"machine": machine(args.device), "size": args.size, "results": figures})


def table(results: list[Measured]) -> list[str]:
    head = ["videos", "one by one, s", "together, s", "times as fast", "cache MB a video", "error"]
    rows = [
        [
            str(found.count), f"{found.apart:.2f}", f"{found.together:.2f}", f"{found.apart / found.together:.2f}",
            f"{found.held / found.count / 1e6:.2f}", f"{found.error:.1e}",
        ]
        for found in results
    ]  # fmt: skip
    return markdown(head, rows)
