"""`python -m rolling_kv bench ranks`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ...config import SamplingConfig
from ...geometry import WAN_21
from ...wan.shards import check_even
from .. import options
from ..figures import hardware, machine, markdown, write_json
from ..random_model import SIZES
from .formula import sent, tokens_of
from .run import Measured, RanksExperiment, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="mid", help="shape of the model (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="processes that share a video (default: 2)")
    parser.add_argument("--height", type=int, help="pixels (default: the size's)")
    parser.add_argument("--width", type=int, help="pixels (default: the size's)")
    parser.add_argument("--chunks", type=int, default=6, help="of each video (default: %(default)s)")
    options.add_dtype(parser)
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "chunks")
    experiment = make_experiment(args)
    print(
        f"{args.size}: {SIZES[args.size].describe()}; {experiment.height}x{experiment.width}, {experiment.dtype}, "
        f"{experiment.chunks} chunks, {experiment.threads} thread a process\n{hardware(args.device)}",
        flush=True,
    )
    results = measure(experiment)
    print("\n" + "\n".join(table(experiment, results)))
    if args.json:
        given = experiment._asdict()
        write_json(
            args.json, {"machine": machine(args.device), "experiment": given, "results": [r._asdict() for r in results]}
        )


def make_experiment(args: argparse.Namespace) -> RanksExperiment:
    """What to measure. Raises ValueError for no size of a video, and for counts of processes that cannot share it evenly."""
    size, counts = SIZES[args.size], tuple(dict.fromkeys((1, *args.ranks)))
    height, width = args.height or size.height, args.width or size.width
    WAN_21.latent_size(height, width)
    heads, tokens = size.heads, tokens_of(height, width, 1)
    for count in counts:
        if count < 1:
            raise ValueError(f"--ranks must be at least 1, got {count}")
        check_even(heads, tokens, count)
        if args.device.type == "cuda" and count > torch.cuda.device_count():
            raise ValueError(f"--ranks {count}: there are {torch.cuda.device_count()} GPUs here")
    dtype = str(options.dtype_of(args)).removeprefix("torch.")
    return RanksExperiment(args.size, height, width, counts, args.chunks, dtype, args.device.type, args.threads or 1)


def counted(experiment: RanksExperiment, ranks: int) -> int:
    """Bytes that one process sends for a chunk with a context pass before it, by the formula."""
    sampling, size = SamplingConfig(), SIZES[experiment.size]
    tokens = tokens_of(experiment.height, experiment.width, sampling.chunk)
    each: Any = (size, tokens, ranks, getattr(torch, experiment.dtype).itemsize)
    return sampling.passes * sent(*each).all + sent(*each, keys_only=True).all


def table(experiment: RanksExperiment, results: list[Measured]) -> list[str]:
    one = results[0]
    head = ["processes", "s a chunk", "times as fast", "MB sent", "MB counted", "cache MB", "error"]
    rows = [
        [
            str(found.ranks), f"{found.seconds:.3f}", f"{one.seconds / found.seconds:.2f}", f"{found.sent / 1e6:.2f}",
            f"{counted(experiment, found.ranks) / 1e6:.2f}", f"{found.cache / 1e6:.2f}", f"{found.error:.1e}",
        ]
        for found in results
    ]  # fmt: skip
    return markdown(head, rows)
