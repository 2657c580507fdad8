"""What `bench states` says: a description, tables for people, JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median

from ..figures import machine, markdown, number, ratios, size
from .experiment import StateExperiment
from .run import FileResult, Results

MEGABYTE = 10**6


def summary(results: Results) -> list[dict]:
    """The figures of the first table, in its order."""
    first = results.ways[0]
    return [
        {"way": result.way.title, "passes": result.passes}
        | ratios((result.seconds, result.cpu_seconds), (first.seconds, first.cpu_seconds))
        for result in results.ways
    ]


def frame_bytes(result: FileResult) -> float:
    """Bytes of the state for each latent frame, its prompts included."""
    return (result.latent_bytes + result.prompt_bytes) / result.frames


def tables(experiment: StateExperiment, results: Results) -> str:
    """Markdown tables, and what their columns mean."""
    ways = []
    for row in summary(results):
        spread = f"{row['least']:.3f} to {row['most']:.3f}" if ways else ""
        times = [number(row["times_the_first"], ".3f"), spread, number(row["cpu_times_the_first"], ".3f")]
        ways.append([row["way"], str(row["passes"]), number(row["seconds"], ".2f"), *times])
    files = []
    for file in results.files:
        row = [f"{file.height}x{file.width}", size(file.latent_bytes), size(file.prompt_bytes), size(file.file_bytes)]
        row += [f"{frame_bytes(file) / MEGABYTE:.3f} MB", f"{file.cache_frame_bytes / MEGABYTE:.1f} MB"]
        files.append([*row, f"{median(file.save_seconds):.3f}", f"{median(file.load_seconds):.3f}"])
    fork, rest = results.fork, experiment.chunks - experiment.half
    frames = results.files[0].frames
    return "\n".join(
        [
            *markdown(["way", "passes", "s", "times the first", "from least to most", "in CPU time"], ways),
            "",
            f"The chain is {experiment.runs} runs. Medians over {len(results.ways[0].seconds)} videos of each way; ratios are of the same "
            "turn. CPU time is that of this process alone, whatever else runs.",
            f"Two branches of {rest} chunks from the middle: {median(fork.first):.2f} s for the first, which takes the cache over, and "
            f"{median(fork.second):.2f} s for the second, which replays.",
            "",
            *markdown(
                ["pixels", "latents", "prompts", "file", "per latent frame", "keys, values", "s to save", "s to load"],
                files,
            ),
            "",
            f"States of {frames} latent frames; keys, values: what one latent frame takes in the cache, and in a state that carries them.",
        ]
    )


def as_json(experiment: StateExperiment, results: Results) -> dict:
    """Everything measured."""
    return {
        "setting": experiment.describe(),
        "machine": machine(experiment.device),
        "runs": experiment.runs,
        "summary": summary(results),
        "ways": [asdict(result) for result in results.ways],
        "fork": asdict(results.fork),
        "files": [asdict(file) | {"bytes_per_latent_frame": frame_bytes(file)} for file in results.files],
    }
