"""One pass over a full window, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch

from ...cache.prompt import Branch, PromptCache
from ...cache.rolling import RollingKVCache
from ...cache.sizes import CacheShape
from ...checkpoints.float8 import store_float8
from ...checkpoints.transformer import build_transformer
from ...config import ExecutionConfig
from ...sampling.memory import Estimate, estimate
from ...wan.attachment import apply_rolling_kv_cache
from ...wan.fast import product_bytes
from ...wan.offloaded import move_outside, offload_blocks, weight_nbytes
from ..chunks.experiment import Workload
from ..gauges import memory_beside, now, storage_bytes, turns
from ..kinds import Kernels, taken_apart

STEP = 750.0
"""A timestep of a denoising step."""
WARMUP = 3


@dataclass(frozen=True)
class PassExperiment:
    """workload: the model, the video and how passes are computed. weights: one of `WEIGHT_STORAGES`. repeats: timed turns.

    offload: keep the weights of the blocks in CPU memory.
    """

    workload: Workload
    weights: str = "model"
    repeats: int = 10
    offload: bool = False

    def __post_init__(self):
        if self.workload.cache.unlimited:
            raise ValueError("a pass is measured with a full window: give --window a number of latent frames")


class PassResult(NamedTuple):
    """Of the passes, in seconds and bytes.

    step, context: a denoising step and a context pass, medians. ready: until the first passes were done, compiling included.
    weights: bytes of the model on the device. announced: for the run, weights not included. held: what stays beside the weights between
    passes: keys and values. peak: the most in use during a step, weights not included. kernels: of a step; None where it is a
    recorded graph.
    """

    step: float
    context: float
    ready: float
    weights: int
    announced: Estimate
    held: int
    peak: int
    kernels: Kernels | None


Passes = tuple[Callable[[], object], Callable[[], object]]


def measure(experiment: PassExperiment) -> PassResult:
    """Make a model, and measure its passes. On a CPU memory is followed before, without compiling."""
    load = experiment.workload
    device, execution = load.device, load.execution
    transformer = build_transformer(
        load.random_weights(), dtype=load.dtype, device="cpu" if experiment.offload else device, runs_on=device
    )
    if experiment.weights == "float8":
        store_float8(transformer)
    weights = storage_bytes([*transformer.parameters(), *transformer.buffers()])
    if experiment.offload:
        offload_blocks(transformer, device).prepare()
        move_outside(transformer, device)
        weights = weight_nbytes(transformer)
    announced = estimate(
        transformer, load.height, load.width, sampling=load.sampling, cache=load.cache, dtype=load.dtype,
        products=product_bytes(execution, transformer, device),
    )  # fmt: skip
    x = load.noise(0, 0).to(load.dtype)
    assert load.prompt.ndim == 3  # made before anything is counted
    counted = execution if device.type == "cuda" else replace(execution, compile=False)
    with torch.inference_mode():
        start = now(device)
        with memory_beside(device) as memory, _opened(load, transformer, counted, x) as passes:
            _warm_up(passes)
            ready = now(device) - start
            memory.restart()
            passes[0]()
            now(device)
            held, peak = memory.live, memory.peak
            if device.type == "cuda":
                step, context, kernels = _timed(experiment, passes)
        if device.type != "cuda":
            start = now(device)
            with _opened(load, transformer, execution, x) as passes:
                _warm_up(passes)
                ready = now(device) - start
                step, context, kernels = _timed(experiment, passes)
    return PassResult(step, context, ready, weights, announced, held, peak, kernels)


@contextmanager
def _opened(load: Workload, transformer, execution: ExecutionConfig, x: torch.Tensor) -> Iterator[Passes]:
    """A step and a context pass of a chunk for which frames have left the window."""
    frames, height, width = x.shape[2:]
    cache = RollingKVCache(CacheShape.of(transformer, 1, height, width, load.dtype), load.cache, load.device)
    cache.window.end = 2 * (load.cache.limit or 0)
    cache.begin(frames)
    branch = Branch(cache, PromptCache(load.prompt))
    with apply_rolling_kv_cache(transformer, execution) as attached:
        yield (
            lambda: attached.forward(x, STEP, branch),
            lambda: attached.forward(x, 0.0, branch, keys_only=True),
        )


def _warm_up(passes: Passes) -> None:
    for run in passes * WARMUP:
        run()


def _timed(experiment: PassExperiment, passes: Passes) -> tuple[float, float, Kernels | None]:
    device = experiment.workload.device
    step, context = (median(turns(run, device, experiment.repeats)) for run in passes)
    recorded = experiment.workload.execution.cuda_graphs
    return step, context, None if recorded else taken_apart(passes[0], device)
