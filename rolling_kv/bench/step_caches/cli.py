"""`python -m rolling_kv bench caching`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ...bundled import default_size
from ...checkpoints.model import load_model
from ...step_cache import METHODS
from ...text import load_text_encoder
from ...vae.loading import AnyVAE, load_vae
from .. import options
from ..figures import write_json
from ..random_model import SIZES, random_model, random_prompt
from .experiment import MODES, StepCacheExperiment, applicable, calibrated, check
from .report import as_json, change_note, constants_notes, describe, table, write_plot
from .run import compare, decode_video, measure, step_change
from .similarity import Similarity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_dtype(parser, "as for generate; of random weights bfloat16 on CUDA, else float32")
    parser.add_argument("--vae", type=Path, help="the Wan VAE of the model's latents, where the model is a single file")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="default: %(default)s, with the rolling cache")
    parser.add_argument("--negative-prompt", default="", help="default: empty")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, unless few-step (default: %(default)s)")
    parser.add_argument("--sampler", choices=["unipc", "euler"], default="unipc", help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="1: off, as in few-step (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=3, help="length of each video (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=1, help="seeds to average over (default: %(default)s)")
    parser.add_argument("--methods", help=f"names, separated by commas (default: all): {', '.join(METHODS)}")
    options.add_machine(parser)
    parser.add_argument("--plot", type=Path, metavar="F", help="draw quality over speed-up into this PNG file")


def main(args: argparse.Namespace, judge: Callable[[torch.Tensor], dict[str, float]] | None = None) -> None:
    """Measure and print; judge: see `compare`. Raises ValueError, before anything runs, for what cannot work."""
    names, notes = applicable(None if args.methods is None else args.methods.replace(" ", "").split(","))
    options.check(args, "chunks", "videos", "steps")
    if args.mode == "few-step":
        if names == calibrated(names):
            titles = " and ".join(METHODS[name].title for name in names)
            raise ValueError(f"{titles} is calibrated for multi-step sampling only: leave out --mode few-step")
    with options.threads(args.threads):
        experiment, vae = make_experiment(args)
        check(experiment)
        print(describe(experiment), flush=True)
        change = step_change(experiment) if experiment.mode == "few-step" else ()
        if experiment.mode == "few-step":
            print(f"{change_note(experiment, change)} The methods are forced on below.", flush=True)
        results, constants = measure(
            experiment, names, on_run=lambda done, total, what: print(f"  {done + 1}/{total} {what}", flush=True)
        )
        if vae is not None:
            similarity = Similarity()
            compare(results, partial(decode_video, vae), similarity, judge=judge)
            notes += similarity.notes
        print(f"\n{table(results)}")
        for note in constants_notes(constants) + notes:
            print(f"\n{note}")
        if args.json:
            write_json(args.json, as_json(experiment, results, constants, change))
        if args.plot:
            write_plot(args.plot, experiment, results)


def make_experiment(args: argparse.Namespace) -> tuple[StepCacheExperiment, AnyVAE | None]:
    """What to measure, and the VAE to compare videos with; None with random weights."""
    vae = None
    if args.size:
        dtype, device = options.dtype_of(args), args.device
        model, prompt = random_model(args.size, dtype, device), random_prompt(dtype, device)
        negative, (height, width) = -prompt, (SIZES[args.size].height, SIZES[args.size].width)
    else:
        dtype, device = args.dtype or "auto", args.device
        model = load_model(args.model, preset=args.preset, dtype=dtype, device=device)
        text = load_text_encoder(args.text_encoder or args.model, dtype=dtype, device=device)
        vae = load_vae(args.vae or args.model, dtype=dtype, device=device, geometry=model.geometry)
        prompt, negative = text.encode([args.prompt]), text.encode([args.negative_prompt])
        height, width = default_size(args.model, model.geometry)
    sampling, cache = model.preset.sampling, model.preset.cache
    if args.mode == "few-step":
        sampling = replace(sampling, sampler="renoise", guidance_scale=1.0)
    else:
        sampling = replace(sampling, sampler=args.sampler, num_inference_steps=args.steps, guidance_scale=args.guidance)
    if args.window is not None:
        cache = replace(cache, window=args.window)
    experiment = StepCacheExperiment(
        model, prompt, negative, args.mode, sampling, cache, args.height or height, args.width or width,
        args.chunks, tuple(range(args.videos)), not args.no_memory,
    )  # fmt: skip
    return experiment, vae
