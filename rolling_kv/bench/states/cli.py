"""`python -m rolling_kv bench states`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ...bundled import default_size
from ...checkpoints.model import load_model
from ...text import load_text_encoder
from .. import options
from ..figures import write_json
from ..random_model import SIZES, random_model, random_prompt
from .experiment import StateExperiment
from .report import as_json, describe, tables
from .run import measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_dtype(parser)
    parser.add_argument("--chunks", type=int, default=10, help="length of each video (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of a chain (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed videos of each way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the video's noise (default: %(default)s)")
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "chunks", "repeats")
    with options.threads(args.threads):
        experiment = make_experiment(args)
        print(describe(experiment), flush=True)
        results = measure(experiment, say=lambda text: print(f"  {text}", flush=True))
        print(f"\n{tables(experiment, results)}")
        if args.json:
            write_json(args.json, as_json(experiment, results))


def make_experiment(args: argparse.Namespace) -> StateExperiment:
    """What to measure: a model from a file, or random weights of a size."""
    device, dtype = args.device, options.dtype_of(args)
    if args.size:
        size = SIZES[args.size]
        model = random_model(args.size, dtype, device)
        prompt = random_prompt(dtype, device, args.seed)
        name = f"{args.size}: {size.describe()}"
        height, width = size.height, size.width
    else:
        model = load_model(args.model, preset=args.preset, dtype=dtype, device=device)
        prompt = load_text_encoder(args.text_encoder or args.model, device=device).encode([args.prompt])
        name = f"{model.preset.name}, {args.prompt!r}"
        height, width = default_size(args.model, model.geometry)
    if args.window is not None:
        model.preset = replace(model.preset, cache=replace(model.preset.cache, window=args.window))
    return StateExperiment(
        name, model, prompt, args.height or height, args.width or width, args.chunks, args.runs, args.repeats, args.seed
    )
