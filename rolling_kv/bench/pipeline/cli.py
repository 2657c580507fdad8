"""`python -m rolling_kv bench pipeline`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ...bundled import default_size
from ...pipeline import Pipeline
from ...vae.loading import AnyVAE
from ...vae.taehv import TinyVAE
from ...vae.wan import WanVAE, streamline
from ...video import ENCODERS, PLAIN
from .. import options
from ..decode.cli import add_vae_size, vae_size_of
from ..figures import hardware, machine, markdown, write_json
from ..random_model import SIZES, random_model, random_prompt, random_taehv, random_vae
from .run import PipelineExperiment, PipelineResult, RandomTexts, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--vae", type=Path, help="the VAE, where the model is a single file; or a tiny decoder, taew2_1"
    )
    add_vae_size(parser)
    parser.add_argument(
        "--tiny-decoder", action="store_true", help="with --size: TAEHV's decoder in the place of the VAE"
    )
    parser.add_argument(
        "--encoder", choices=ENCODERS, default=PLAIN, help="what encodes the video (default: %(default)s)"
    )
    options.add_dtype(parser)
    parser.add_argument("--chunks", type=int, default=8, help="of the video (default: %(default)s)")
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "chunks")
    with options.threads(args.threads):
        experiment = make_experiment(args)
        name = f"{args.size}, random weights, no text encoder" if args.size else experiment.pipeline.model.preset.name
        print(f"{name}; {experiment.height}x{experiment.width}, {experiment.chunks} chunks\n{hardware(args.device)}")
        result = measure(experiment)
        print("\n" + "\n".join(table(result)))
        if args.json:
            figures = result._asdict() | {"frames_per_second": result.frames_per_second, "shares": result.shares}
            write_json(args.json, {"machine": machine(args.device), "setting": name, **figures})


def make_experiment(args: argparse.Namespace) -> PipelineExperiment:
    """What to measure: a model from files, or random weights of a size, with a VAE of random weights and a prompt of noise."""
    dtype = options.dtype_of(args)
    if args.size:
        shape, model = SIZES[args.size], random_model(args.size, dtype, args.device)
        texts = RandomTexts(random_prompt(dtype, torch.device("cpu")))
        pipeline = Pipeline(model, texts, _random_decoder(args, dtype))
        height, width = shape.height, shape.width
    else:
        pipeline = Pipeline.load(
            args.model, text_encoder=args.text_encoder, vae=args.vae, preset=args.preset, dtype=args.dtype or "auto",
            device=args.device,
        )  # fmt: skip
        height, width = default_size(args.model, pipeline.model.geometry)
    preset = pipeline.model.preset
    if args.window is not None:
        pipeline.model.preset = replace(preset, cache=replace(preset.cache, window=args.window))
    size = args.height or height, args.width or width
    return PipelineExperiment(pipeline, *size, args.chunks, encoder=args.encoder)


def _random_decoder(args: argparse.Namespace, dtype: torch.dtype) -> AnyVAE:
    if args.tiny_decoder:
        return TinyVAE(random_taehv(dtype, args.device))
    vae = random_vae(vae_size_of(args), dtype, args.device)
    if dtype.itemsize < 4:
        streamline(vae)
    return WanVAE(vae)


def table(result: PipelineResult) -> list[str]:
    """The whole in a line, and each part alone."""
    rows = [[part, f"{took:.3f}", f"{result.shares[part]:.3f}"] for part, took in result.parts.items()]
    together = sum(result.parts.values())
    return [
        f"{result.frames} frames in {result.whole:.2f} s: {result.frames_per_second:.2f} frames per second, the first after "
        f"{result.first_frame:.2f} s; encoded with {result.encoder}. Its parts, one after the other, take {together:.2f} s:",
        "",
        *markdown(["part alone", "s", "share"], rows),
    ]
