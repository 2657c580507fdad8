"""`python -m rolling_kv bench storage`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ...bundled import default_size
from ...checkpoints.gguf import is_packed
from ...checkpoints.model import load_model
from ...text import load_text_encoder
from .. import options
from ..figures import write_json
from ..random_model import SIZES, random_preset, random_prompt, random_weights
from .experiment import StorageExperiment, check_packings, variants
from .report import as_json, describe, table
from .run import measure

NO_PACKING = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_dtype(parser)
    parser.add_argument("--chunks", type=int, default=10, help="length of each video (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the video's noise (default: %(default)s)")
    parser.add_argument(
        "--gguf", default="Q8_0,Q4_0", help=f"packings to compare, or {NO_PACKING} (default: %(default)s)"
    )
    options.add_machine(parser)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything runs, for what cannot work."""
    packings = [] if args.gguf == NO_PACKING else args.gguf.replace(" ", "").split(",")
    check_packings(packings)
    options.check(args, "chunks")
    with options.threads(args.threads):
        experiment = make_experiment(args)
        print(describe(experiment), flush=True)
        results = measure(experiment, variants(packings), say=lambda text: print(f"  {text}", flush=True))
        print(f"\n{table(experiment, results)}")
        if args.json:
            write_json(args.json, as_json(experiment, results))


def make_experiment(args: argparse.Namespace) -> StorageExperiment:
    """What to measure: a model from a file, or random weights of a size."""
    device, dtype = args.device, options.dtype_of(args)
    if args.size:
        size = SIZES[args.size]
        preset = random_preset(args.size, args.window)
        weights, config = random_weights(size, dtype, device, args.seed), {}
        prompt = random_prompt(dtype, device, args.seed)
        name = f"{args.size}: {size.describe()}"
        height, width = size.height, size.width
    else:
        model = load_model(args.model, preset=args.preset, dtype=dtype, device=device)
        weights, config = model.transformer.state_dict(), dict(model.transformer.config)
        if any(map(is_packed, weights.values())):
            raise ValueError(f"{args.model} is packed already; name the unpacked model, it is packed here")
        prompt = load_text_encoder(args.text_encoder or args.model, device=device).encode([args.prompt])
        preset, name = model.preset, f"{model.preset.name}, {args.prompt!r}"
        if args.window is not None:
            preset = replace(preset, cache=replace(preset.cache, window=args.window))
        height, width = default_size(args.model, model.geometry)
    if preset.sampling.guided:
        raise ValueError("this compares few-step models, which sample without guidance: choose another --preset")
    return StorageExperiment(
        name, weights, config, preset, prompt, args.height or height, args.width or width, args.chunks, dtype, device,
        args.seed, not args.no_memory,
    )  # fmt: skip
