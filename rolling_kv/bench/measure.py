"""Run every method over the same chunks in turn, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from .memory import CudaGauge, storage_bytes
from .methods import Method
from .workload import Workload

Say = Callable[[str], None]

TOLERANCE = 1e-3
"""Largest difference between two methods' latents, relative in the 2-norm, in float32 with a float32 cache."""
COARSE_TOLERANCE = 0.2
"""The same in half precision, or with a quantised cache: enough to tell rounding from another video (1.4)."""


class BenchError(ValueError):
    """Two methods that should make the same video do not, so they are not doing the same work."""


@dataclass
class Result:
    """What was measured of one method. Lists are by chunk number.

    seconds: one list per repeat. kv_bytes: None without a cache. peak_bytes: the most memory in use during the chunk,
    weights included, the finished video not; empty where it was not measured.
    """

    letter: str
    title: str
    note: str
    seconds: list[list[float]] = field(default_factory=list)
    kv_bytes: list[int | None] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    def chunk_seconds(self, index: int) -> float:
        """Median over the repeats."""
        return median(run[index] for run in self.seconds)

    def full_seconds(self, workload: Workload) -> float:
        """Median over the chunks with a full window, and the repeats."""
        return median(run[index] for run in self.seconds for index in workload.full_window)


def share_of_floor(workload: Workload, result: Result, floor: Result) -> float:
    """Median of floor time / time over the chunks with a full window; each pair ran one right after the other."""
    pairs = zip(floor.seconds, result.seconds)
    return median(bare[index] / taken[index] for bare, taken in pairs for index in workload.full_window)


def measure(
    workload: Workload, methods: Sequence[type[Method]], *, repeats: int = 1, warmup: int = 0, memory: bool = True,
    say: Say = print,
) -> list[Result]:
    """Measure each method; the results are in the order of `methods`.

    warmup: chunks of an untimed run before the others. memory: without CUDA, follow peak memory in an untimed run of
    each method; CUDA's allocator counts in the timed runs. Raises BenchError if methods disagree about the video.
    """
    weights = workload.random_weights()
    results = [Result(method.letter, method.title, method.note) for method in methods]
    if warmup:
        _run(workload, min(warmup, workload.chunks), methods, weights, None, lambda text: say(f"warm-up, {text}"))
    for repeat in range(repeats):
        label = f"run {repeat + 1} of {repeats}, "
        _run(workload, workload.chunks, methods, weights, results, lambda text, label=label: say(label + text))
    if memory and workload.device.type != "cuda":
        for method, result in zip(methods, results):
            say(f"following the memory of ({method.letter})")
            result.peak_bytes = method.follow_memory(workload, weights)
    return results


def _run(
    workload: Workload, chunks: int, methods: Sequence[type[Method]], weights: dict[str, Tensor],
    results: list[Result] | None, say: Say,
) -> None:
    """Open every method and make `chunks` chunks with each in turn; what is measured is added to `results`."""
    cuda = workload.device.type == "cuda"
    gauge = CudaGauge(workload.device, storage_bytes(weights.values())) if cuda else None
    with ExitStack() as stack:
        opened = []
        for method in methods:
            with gauge.turn(method.letter) if gauge else nullcontext():
                opened.append(method(workload, weights))
            stack.callback(opened[-1].close)
        runs = [[] for _ in methods]
        for index in range(chunks):
            videos = {}
            for method, run in zip(opened, runs):
                with gauge.turn(method.letter) if gauge else nullcontext():
                    run.append(_timed(workload.device, method, index, videos))
                _note(method, gauge, results)
            check_agreement(workload, index, videos)
            say(f"chunk {index + 1}: " + ", ".join(f"({m.letter}) {run[-1]:.3f} s" for m, run in zip(opened, runs)))
    for result, run in zip(results or [], runs):
        result.seconds.append(run)
