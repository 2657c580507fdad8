"""`python -m rolling_kv bench preview`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from statistics import median

import torch

from ...previews import LinearPreview, load_fitted
from .. import options, subject
from ..figures import machine, markdown, number, ratios, write_json
from .experiment import PreviewExperiment
from .run import PreviewResult, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser, chunks=6)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "chunks", "repeats")
    with options.threads(args.threads):
        experiment = make_experiment(args)
        print(experiment.describe(), flush=True)
        results = measure(experiment, say=lambda text: print(f"  {text}", flush=True))
        print(f"\n{table(results)}")
        if args.json:
            write_json(args.json, as_json(experiment, results))


def make_experiment(args: argparse.Namespace) -> PreviewExperiment:
    """What to measure. A model whose numbers nobody has fitted gets random ones, which cost as much."""
    given = subject.fields_of(args)
    fitted = None if args.size else load_fitted(args.model)
    preview = fitted or LinearPreview(torch.randn(given["model"].geometry.channels, 3).tolist(), [0.0] * 3)
    return PreviewExperiment(**given, preview=preview)


def summary(results: list[PreviewResult]) -> list[dict]:
    """The figures of the table, in its order."""
    first, rows = results[0], []
    for result in results:
        row = {"way": result.way} | ratios((result.seconds, result.cpu_seconds), (first.seconds, first.cpu_seconds))
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
        "setting": experiment.describe(),
        "machine": machine(experiment.device),
        "summary": summary(results),
        "ways": [asdict(result) for result in results],
    }


def _kilobytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1000:.1f} kB"
