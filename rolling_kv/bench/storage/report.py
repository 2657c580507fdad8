"""What `bench storage` says: a description, a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from ..figures import hardware, machine, markdown, number, size, span
from .experiment import StorageExperiment
from .run import StorageResult


def summary(experiment: StorageExperiment, results: Sequence[StorageResult]) -> list[dict]:
    """The figures of the table, in its order; times and errors are medians over the chunks with a full window."""
    first, full = results[0], experiment.full_window
    return [
        asdict(result.variant)
        | {
            "weight_bytes": result.weight_bytes,
            "cache_device_bytes": result.cache_bytes.device,
            "cache_host_bytes": result.cache_bytes.host,
            "peak_bytes": result.peak_bytes,
            "seconds": median(result.seconds[index] for index in full),
            "times_the_first": median(result.seconds[index] / first.seconds[index] for index in full),
            "error": median(result.error[index] for index in full),
        }
        for result in results
    ]


def table(experiment: StorageExperiment, results: Sequence[StorageResult]) -> str:
    """A Markdown table, and what its columns mean."""
    head = ["weights", "cache", "offloaded", "weights take", "keys, values", "in CPU memory", "peak memory"]
    head += ["s per chunk", "times the first", "error"]
    rows = []
    for row in summary(experiment, results):
        sizes = [row["weight_bytes"], row["cache_device_bytes"], row["cache_host_bytes"] or None, row["peak_bytes"]]
        times = [number(row["seconds"], ".3f"), number(row["times_the_first"], ".2f"), number(row["error"], ".1e")]
        rows.append([row["weights"], row["cache"], "yes" if row["offload"] else "", *map(size, sizes), *times])
    window = experiment.preset.cache.limit
    dtype = str(experiment.dtype).removeprefix("torch.")
    lines = [
        *markdown(head, rows),
        "",
        f"model: {dtype}. Window of {f'{window} latent frames' if window else 'all frames'}; medians over {span(experiment.full_window)}. "
        "Error: 2-norm of the difference from the latents that the same weights make in float32, relative to those.",
    ]
    return "\n".join(lines)


def describe(experiment: StorageExperiment) -> str:
    """Two lines: the model and the video, then the machine."""
    return (
        f"{experiment.name}; {experiment.height}x{experiment.width}, {experiment.chunks} chunk{'s' * (experiment.chunks > 1)} of "
        f"{experiment.preset.sampling.chunk} latent frames, "
        f"{str(experiment.dtype).removeprefix('torch.')}\n{hardware(experiment.device)}"
    )


def as_json(experiment: StorageExperiment, results: Sequence[StorageResult]) -> dict:
    """Everything measured."""
    return {
        "setting": describe(experiment),
        "machine": machine(experiment.device),
        "full_window_chunks": [index + 1 for index in experiment.full_window],
        "summary": summary(experiment, results),
        "by_chunk": [asdict(result) for result in results],
    }
