"""`python -m rolling_kv bench storage`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints import load_model
from ..config import PRESETS, CacheConfig, ModelPreset, SamplingConfig
from ..text import load_text_encoder
from ..tiny import BUNDLED
from ..weights import is_packed
from .report import write_json
from .storage import Setting, as_json, check_packings, describe, measure, table, variants
from .workload import SIZES, Workload

NO_PACKING = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=BUNDLED, help="as for generate (default: the bundled tiny model)")
    parser.add_argument("--text-encoder", type=Path, help="UMT5, where the model is a single file")
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="what the model was trained for")
    parser.add_argument("--prompt", default="a red circle moving left", help="default: %(default)s")
    parser.add_argument("--size", choices=SIZES, help="random weights of this shape instead of a model")
    parser.add_argument("--height", type=int, help="pixels (default: the size's; 64 for the bundled model, else 480)")
    parser.add_argument("--width", type=int, help="pixels (default: the size's; 64 for the bundled model, else 832)")
    parser.add_argument("--window", type=int, help="latent frames a chunk attends to (default: the model's)")
    parser.add_argument("--chunks", type=int, default=10, help="length of each video (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the video's noise (default: %(default)s)")
    parser.add_argument(
        "--gguf", default="Q8_0,Q4_0", help=f"packings to compare, or {NO_PACKING} (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="without CUDA: leave out the runs that follow memory")
    parser.add_argument("--json", type=Path, metavar="F", help="write all figures to this file")


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything runs, for what cannot work."""
    packings = [] if args.gguf == NO_PACKING else args.gguf.replace(" ", "").split(",")
    check_packings(packings)
    if args.chunks < 1 or args.threads is not None and args.threads < 1:
        raise ValueError(f"--chunks and --threads must be at least 1, got {args.chunks} and {args.threads}")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"the folder of {args.json} does not exist; make it first")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        setting = make_setting(args)
        print(describe(setting), flush=True)
        results = measure(setting, variants(packings), say=lambda text: print(f"  {text}", flush=True))
        print(f"\n{table(setting, results)}")
        if args.json:
            write_json(args.json, as_json(setting, results))
    finally:
        torch.set_num_threads(threads)


def make_setting(args: argparse.Namespace) -> Setting:
    """What to measure: a model from a file, or random weights of a size."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.size:
        size = SIZES[args.size]
        workload = Workload(
            size, args.height or size.height, args.width or size.width, args.chunks,
            CacheConfig(size.window if args.window is None else args.window), dtype=dtype, device=device,
        )  # fmt: skip
        preset = ModelPreset(f"random {args.size}", SamplingConfig(), workload.cache)
        weights, config, prompt = workload.random_weights(), {}, workload.prompt
        name = f"{args.size}: {size.layers} layers, dim {size.dim}, random weights"
        height, width = workload.height, workload.width
    else:
        if args.model == BUNDLED and not BUNDLED.is_dir():
            raise ValueError(f"the tiny model is not there; make it with: python -m rolling_kv make-tiny {BUNDLED}")
        model = load_model(args.model, preset=args.preset, dtype=dtype, device=device)
        weights, config = model.transformer.state_dict(), dict(model.transformer.config)
        if any(map(is_packed, weights.values())):
            raise ValueError(f"{args.model} is packed already; name the unpacked model, it is packed here")
        prompt = load_text_encoder(args.text_encoder or args.model, device=device).encode([args.prompt])
        preset, name = model.preset, f"{model.preset.name}, {args.prompt!r}"
        if args.window is not None:
            preset = replace(preset, cache=replace(preset.cache, window=args.window))
        small = args.model == BUNDLED
        height, width = args.height or (64 if small else 480), args.width or (64 if small else 832)
    if preset.sampling.guided:
        raise ValueError("this compares few-step models, which sample without guidance: choose another --preset")
    return Setting(
        name, weights, config, preset, prompt, height, width, args.chunks, dtype, device, args.seed, not args.no_memory
    )
