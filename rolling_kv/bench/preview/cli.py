"""`python -m rolling_kv bench preview`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from statistics import median

import torch

from ...bundled import default_size
from ...checkpoints.model import load_model
from ...previews import LinearPreview, load_fitted
from ...text import load_text_encoder
from .. import options
from ..figures import hardware, machine, markdown, number, write_json
from ..random_model import SIZES, random_model, random_prompt
from .experiment import PreviewExperiment
from .run import PreviewResult, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_dtype(parser)
    parser.add_argument("--chunks", type=int, default=6, help="length of each video (default: %(default)s)")
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
        print(f"\n{table(results)}")
        if args.json:
            write_json(args.json, as_json(experiment, results))


def make_experiment(args: argparse.Namespace) -> PreviewExperiment:
    """What to measure: a model from a file, or random weights of a size."""
    device, dtype = args.device, options.dtype_of(args)
    if args.size:
        chosen = SIZES[args.size]
        model, prompt = random_model(args.size, dtype, device), random_prompt(dtype, device, args.seed)
        name, height, width, fitted = f"{args.size}: {chosen.describe()}", chosen.height, chosen.width, None
    else:
        model = load_model(args.model, preset=args.preset, dtype=dtype, device=device)
        prompt = load_text_encoder(args.text_encoder or args.model, device=device).encode([args.prompt])
        name, fitted = f"{model.preset.name}, {args.prompt!r}", load_fitted(args.model)
        height, width = default_size(args.model, model.geometry)
    if args.window is not None:
        model.preset = replace(model.preset, cache=replace(model.preset.cache, window=args.window))
    preview = fitted or LinearPreview(torch.randn(model.geometry.channels, 3).tolist(), [0.0] * 3)
    return PreviewExperiment(
        name, model, prompt, preview, args.height or height, args.width or width, args.chunks, args.repeats, args.seed
    )


def describe(experiment: PreviewExperiment) -> str:
    """Two lines: the model and the video, then the machine."""
    chunk, dtype = experiment.model.preset.sampling.chunk, str(experiment.model.dtype).removeprefix("torch.")
    return (
        f"{experiment.name}; {experiment.height}x{experiment.width}, {experiment.chunks} chunks of {chunk} latent frames, "
        f"{dtype}\n{hardware(experiment.device)}"
    )


def summary(results: list[PreviewResult]) -> list[dict]:
    """The figures of the table, in its order."""
    first, rows = results[0], []
    for result in results:
        ratios = [own / other for own, other in zip(result.seconds, first.seconds)]
        cpu_ratios = [own / other for own, other in zip(result.cpu_seconds, first.cpu_seconds)]
        row = {"way": result.way, "seconds": median(result.seconds), "times_the_first": median(ratios)}
        row |= {"least": min(ratios), "most": max(ratios), "cpu_times_the_first": median(cpu_ratios)}
        rows.append(row | {"strip_bytes": round(median(result.strip_bytes)) if result.strip_bytes else None})
    return rows


def table(results: list[PreviewResult]) -> str:
    """A Markdown table, and what its columns mean."""
    rows = []
    for row in summary(results):
        spread = f"{row['least']:.3f} to {row['most']:.3f}" if rows else ""
        numbers = [number(row["seconds"], ".2f"), number(row["times_the_first"], ".3f"), spread]
        rows.append([row["way"], *numbers, number(row["cpu_times_the_first"], ".3f"), _kilobytes(row["strip_bytes"])])
    head = ["pictures", "s", "times the first", "from least to most", "in CPU time", "a chunk's file"]
    return "\n".join(
        [
            *markdown(head, rows),
            "",
            f"Medians over {len(results[0].seconds)} videos of each way; ratios are of the same turn. Linear: a picture for each latent "
            "frame, as Sample Video shows without a VAE. Frames: those of the video, decoded already, as Stream Video shows; here of "
            "noise, the most that they can cost. All pictures are waited for, as if no processor were free for them.",
        ]
    )


def as_json(experiment: PreviewExperiment, results: list[PreviewResult]) -> dict:
    """Everything measured."""
    return {
        "setting": describe(experiment),
        "machine": machine(experiment.device),
        "summary": summary(results),
        "ways": [asdict(result) for result in results],
    }


def _kilobytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1000:.1f} kB"
