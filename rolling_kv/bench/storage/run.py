"""Make the same video with every variant in turn, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...cache.sizes import CacheBytes
from ...checkpoints.model import CausalModel
from ...sampling.session import RollingSession
from ..figures import BenchError
from ..gauges import CudaGauge, TensorBytes, now, storage_bytes
from .experiment import PLAIN, StorageExperiment, Variant, build

Say = Callable[[str], None]


@dataclass
class StorageResult:
    """seconds, error: by chunk number; error is the relative 2-norm of the latents' difference from float32.

    The video runs freely: a chunk's error comes from everything before it too. peak_bytes: the most in use during a
    chunk, weights included, the finished video not; None where it was not followed.
    """

    variant: Variant
    weight_bytes: int = 0
    cache_bytes: CacheBytes = CacheBytes(0, 0)
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


class StorageRun:
    """One video that is made chunk by chunk; a context manager around its session."""

    def __init__(self, experiment: StorageExperiment, variant: Variant, model: CausalModel):
        self.weight_bytes = storage_bytes([*model.parameters(), *model.buffers()])
        cache = replace(experiment.preset.cache, storage=variant.cache, offload=variant.offload)
        self.session = RollingSession(
            model, experiment.prompt, height=experiment.height, width=experiment.width, cache=cache
        )
        self._video = self.session.generate(experiment.chunks, seed=experiment.seed)

    def __enter__(self) -> StorageRun:
        self.session.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._video.close()
        self.session.__exit__(*exception)

    def chunk(self) -> Tensor:
        """The next chunk's clean latents, [1, C, f, h, w]."""
        return next(self._video).latents


def reference(experiment: StorageExperiment) -> list[Tensor]:
    """The chunks that the same weights make in float32."""
    full = replace(experiment, prompt=experiment.prompt.float())
    with StorageRun(full, Variant(), build(full, PLAIN, torch.float32)) as run:
        return [run.chunk() for _ in range(experiment.chunks)]


def measure(experiment: StorageExperiment, chosen: Sequence[Variant], *, say: Say = print) -> list[StorageResult]:
    """Make the same video with each variant, in turns chunk by chunk, so that whatever else the machine does hits all.

    Raises BenchError for a video with values that are not finite.
    """
    say("float32, for comparison")
    expected = reference(experiment)
    models = [build(experiment, variant.weights) for variant in chosen]
    if experiment.device.type == "cuda":  # what is set up once is not what is measured
        _take_turns(replace(experiment, chunks=min(2, experiment.chunks)), chosen, models, expected, lambda _: None)
    results = _take_turns(experiment, chosen, models, expected, say)
    if experiment.memory and experiment.device.type != "cuda":
        for result, model in zip(results, models):
            say(f"following the memory of {result.variant.title}")
            result.peak_bytes = peak_bytes(experiment, result.variant, model)
    return results


def _take_turns(
    experiment: StorageExperiment,
    chosen: Sequence[Variant],
    models: Sequence[CausalModel],
    expected: Sequence[Tensor],
    say: Say,
) -> list[StorageResult]:
    gauge = CudaGauge(experiment.device, 0) if experiment.device.type == "cuda" else None
    results = [StorageResult(variant) for variant in chosen]

    def turn(variant: Variant):
        return gauge.turn(variant.title) if gauge else nullcontext()

    with ExitStack() as stack:
        runs = []
        for variant, model in zip(chosen, models):
            with turn(variant):
                runs.append(stack.enter_context(StorageRun(experiment, variant, model)))
        for index in range(experiment.chunks):
            for run, result in zip(runs, results):
                with turn(result.variant):
                    start = now(experiment.device)
                    video = run.chunk()
                    result.seconds.append(now(experiment.device) - start)
                if not video.isfinite().all():
                    raise BenchError(f"{result.variant.title}: chunk {index + 1} has values that are not finite")
                difference = video.float() - expected[index]
                result.error.append((difference.norm() / expected[index].norm()).item())
            say(f"chunk {index + 1} of {experiment.chunks}")
        for run, result in zip(runs, results):
            result.weight_bytes, result.cache_bytes = run.weight_bytes, run.session.cache_bytes
            result.peak_bytes = gauge.peaks[result.variant.title] + run.weight_bytes if gauge else None
    return results


def peak_bytes(experiment: StorageExperiment, variant: Variant, model: CausalModel) -> int:
    """Most bytes of tensors alive during a chunk, weights included, from an untimed run up to the first full window."""
    run = StorageRun(experiment, variant, model)
    with TensorBytes(run.weight_bytes) as tensors, run:
        for _ in range(experiment.full_window[0] + 1):
            tensors.restart()
            run.chunk()
        return tensors.peak - sum(chunk.nbytes for chunk in run.session.state.chunks)
