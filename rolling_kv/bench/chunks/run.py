"""Run every contender over the same chunks in turn, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from ..figures import BenchError
from ..gauges import CudaGauge, now, storage_bytes
from .contenders import Contender
from .experiment import Workload

Say = Callable[[str], None]

TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference between the latents of two contenders, relative in the 2-norm. Rounding makes about a third of it at
the tiny size; with random weights, attending to one frame more or less makes 1e-4."""
QUANTISED_TOLERANCE = 2e-2
"""The same where the cache is kept in fewer bits, in any dtype."""


@dataclass
class Result:
    """What was measured of one contender. Lists are by chunk number.

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
    workload: Workload,
    contenders: Sequence[type[Contender]],
    *,
    repeats: int = 1,
    warmup: int = 0,
    memory: bool = True,
    say: Say = print,
) -> list[Result]:
    """Measure each contender; the results are in their order.

    warmup: chunks of an untimed run before the others. memory: without CUDA, follow peak memory in an untimed run of
    each; CUDA's allocator counts in the timed runs. Raises BenchError if contenders disagree about the video.
    """
    weights = workload.random_weights()
    if warmup:
        _run(workload, min(warmup, workload.chunks), contenders, weights, lambda text: say(f"warm-up, {text}"))
    runs = []
    for number in range(1, repeats + 1):
        label = f"run {number} of {repeats}, "
        runs.append(_run(workload, workload.chunks, contenders, weights, lambda text, label=label: say(label + text)))
    results = runs[0]
    for run in runs[1:]:
        for result, more in zip(results, run):
            result.seconds += more.seconds
    if memory and workload.device.type != "cuda":
        for contender, result in zip(contenders, results):
            say(f"following the memory of ({result.letter})")
            result.peak_bytes = contender.follow_memory(workload, weights)
    return results


def _run(
    workload: Workload, chunks: int, contenders: Sequence[type[Contender]], weights: dict[str, Tensor], say: Say
) -> list[Result]:
    """Open every contender and make `chunks` chunks with each in turn."""
    cuda = workload.device.type == "cuda"
    gauge = CudaGauge(workload.device, storage_bytes(weights.values())) if cuda else None
    results = [Result(kind.letter, kind.title, kind.note, [[]]) for kind in contenders]
    with ExitStack() as stack:
        opened = []
        for kind in contenders:
            with gauge.turn(kind.letter) if gauge else nullcontext():
                opened.append(kind(workload, weights))
            stack.callback(opened[-1].close)
        for index in range(chunks):
            videos = {}
            for contender, result in zip(opened, results):
                with gauge.turn(result.letter) if gauge else nullcontext():
                    seconds, videos[result.letter] = _timed(contender, index, workload.device)
                result.seconds[0].append(seconds)
                result.kv_bytes.append(contender.kv_bytes)
                if gauge:
                    result.peak_bytes.append(contender.peak_bytes or gauge.peaks[result.letter])
            check_finite(index, videos)
            check_agreement(workload, index, videos)
            say(f"chunk {index + 1}: " + ", ".join(f"({r.letter}) {r.seconds[0][-1]:.3f} s" for r in results))
    return results


def _timed(contender: Contender, index: int, device: torch.device) -> tuple[float, Tensor | None]:
    """Seconds, and what was made. The device is waited for here and nowhere inside."""
    start = now(device)
    video = contender.chunk(index)
    return now(device) - start, video


def check_finite(index: int, videos: dict[str, Tensor | None]) -> None:
    """Raise BenchError unless every value of chunk number `index` is finite. videos: latents by letter."""
    for letter, video in videos.items():
        if video is not None and not video.isfinite().all():
            raise BenchError(
                f"({letter}) made a chunk {index + 1} with values that are not finite; the times are of no use"
            )


def check_agreement(workload: Workload, index: int, videos: dict[str, Tensor | None]) -> None:
    """Raise BenchError unless contenders that should have made the same chunk number `index` have done so.

    videos: latents by letter; (a) is what the others are compared with. (b) is the same for the first chunk only, where
    there is nothing to recompute; (c) and (d) are until the first frame has to leave the window.
    """
    unfilled = workload.frames_used(index) == (index + 1) * workload.sampling.chunk
    limit = TOLERANCE[workload.dtype] if workload.cache.storage == "model" else QUANTISED_TOLERANCE
    for letter, same in (("b", index == 0), ("c", unfilled), ("d", unfilled)):
        ours, theirs = videos.get("a"), videos.get(letter)
        if not same or ours is None or theirs is None:
            continue
        difference = ((theirs.float() - ours.float()).norm() / ours.float().norm()).item()
        if not difference <= limit:
            raise BenchError(
                f"({letter}) and (a) should make the same chunk {index + 1}, but their latents differ by "
                f"{difference:.1e} of their size, where at most {limit:.0e} is rounding; the times are not comparable"
            )
