"""`python -m rolling_kv bench caching`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoints import load_model
from ..config import PRESETS, CacheConfig, ModelPreset, SamplingConfig
from ..model import CausalModel
from ..step_cache import METHODS
from ..text import load_text_encoder
from ..tiny import BUNDLED
from ..vae import WanVAE, load_vae
from .caching import MODES, Setting, applicable, check, compare, decode_video, measure, step_change
from .caching_report import as_json, change_note, describe, ratios_note, table, write_plot
from .methods import make_transformer
from .report import write_json
from .similarity import Similarity
from .workload import SIZES, Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=BUNDLED, help="as for generate (default: the bundled tiny model)")
    parser.add_argument("--text-encoder", type=Path, help="UMT5, where the model is a single file")
    parser.add_argument("--vae", type=Path, help="the Wan 2.1 VAE, where the model is a single file")
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="what the model was trained for")
    parser.add_argument("--size", choices=SIZES, help="random weights of this shape instead: no quality")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="default: %(default)s, with the rolling cache")
    parser.add_argument("--prompt", default="a red circle moving left", help="default: %(default)s")
    parser.add_argument("--negative-prompt", default="", help="default: empty")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, unless few-step (default: %(default)s)")
    parser.add_argument("--sampler", choices=["unipc", "euler"], default="unipc", help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="1: off, as in few-step (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=3, help="length of each video (default: %(default)s)")
    parser.add_argument("--height", type=int, help="pixels (default: 64 for the bundled model, else 480)")
    parser.add_argument("--width", type=int, help="pixels (default: 64 for the bundled model, else 832)")
    parser.add_argument("--window", type=int, help="latent frames a chunk attends to (default: the preset's)")
    parser.add_argument("--videos", type=int, default=1, help="seeds to average over (default: %(default)s)")
    parser.add_argument("--methods", help=f"names, separated by commas (default: all): {', '.join(METHODS)}")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="without CUDA: leave out the runs that follow memory")
    parser.add_argument("--json", type=Path, metavar="F", help="write all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw quality over speed-up into this PNG file")


def main(args: argparse.Namespace, judge: Callable[[torch.Tensor], dict[str, float]] | None = None) -> None:
    """Measure and print; judge: see `compare`. Raises ValueError, before anything runs, for what cannot work."""
    names, notes = applicable(None if args.methods is None else args.methods.replace(" ", "").split(","))
    for name in ("chunks", "videos", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist; make it first")
    if args.plot and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG picture: name it .png, not {args.plot.name}")
    if args.mode == "few-step":
        names = [name for name in names if name != "magcache"]  # it is calibrated for multi-step sampling only
        if not names:
            raise ValueError("MagCache is calibrated for multi-step sampling only: leave out --mode few-step")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    setting, vae = make_setting(args)
    check(setting)
    print(describe(setting), flush=True)
    if setting.mode == "few-step":
        print(f"{change_note(setting, step_change(setting))} The methods are forced on below.")
    results, ratios = measure(
        setting, names, on_run=lambda done, total, what: print(f"  {done + 1}/{total} {what}", flush=True)
    )
    if vae is not None:
        similarity = Similarity()
        compare(results, partial(decode_video, vae), similarity, judge=judge)
        notes += similarity.notes
    print(f"\n{table(results)}")
    for note in [ratios_note(ratios)] * bool(ratios) + notes:
        print(f"\n{note}")
    if args.json:
        write_json(args.json, as_json(setting, results, ratios))
    if args.plot:
        write_plot(args.plot, setting, results)


def make_setting(args: argparse.Namespace) -> tuple[Setting, WanVAE | None]:
    """What to measure, and the VAE to compare videos with; None with random weights."""
    if args.size:
        model, prompt, negative, vae = _random_model(args)
    else:
        if args.model == BUNDLED and not BUNDLED.is_dir():
            raise ValueError(f"the tiny model is not there; make it with: python -m rolling_kv make-tiny {BUNDLED}")
        model = load_model(args.model, preset=args.preset, dtype=args.dtype, device=args.device)
        text = load_text_encoder(args.text_encoder or args.model, dtype=args.dtype, device=args.device)
        vae = load_vae(args.vae or args.model, dtype=args.dtype, device=args.device)
        prompt, negative = text.encode([args.prompt]), text.encode([args.negative_prompt])
    small = args.size is None and args.model == BUNDLED
    height, width = (64, 64) if small else (480, 832)
    if args.size:
        height, width = SIZES[args.size].height, SIZES[args.size].width
    sampling, cache = model.preset.sampling, model.preset.cache
    if args.mode == "few-step":
        sampling = replace(sampling, sampler="renoise", guidance_scale=1.0)
    else:
        sampling = replace(sampling, sampler=args.sampler, num_inference_steps=args.steps, guidance_scale=args.guidance)
    if args.window is not None:
        cache = replace(cache, window=args.window)
    setting = Setting(
        model, prompt, negative, args.mode, sampling, cache, args.height or height, args.width or width,
        args.chunks, tuple(range(args.videos)), not args.no_memory,
    )  # fmt: skip
    return setting, vae


def _random_model(args: argparse.Namespace) -> tuple:
    size, device = SIZES[args.size], torch.device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    cache = CacheConfig(size.window)
    workload = Workload(size, size.height, size.width, args.chunks, cache, dtype=getattr(torch, dtype), device=device)
    preset = ModelPreset(f"random {args.size}", SamplingConfig(), cache)
    model = CausalModel(make_transformer(workload, workload.random_weights()), preset)
    return model, workload.prompt, -workload.prompt, None
