"""A piece of work taken apart: how long the device computes in each kind of kernel."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .gauges import now

KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "attn"),
    "convolution": ("conv", "fprop", "vol2col", "im2col"),
    "matrix product": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "addmm", "linear", "bmm", "::mm"),
    "copy": ("memcpy", "memset", "copy_", "::cat", "catarray"),
}
"""Words in the names of kernels, or of a CPU's operations, by kind; the first kind that fits counts."""
OTHER = "other"
LONGEST_NAME = 70


class Kernels(NamedTuple):
    """What one turn of a piece of work is made of. Times in milliseconds.

    kinds: time by kind. launches: kernels, or operations of a CPU. asked: until the CPU has asked for all of it.
    longest: name and time of those that took longest, all calls of one together.
    """

    kinds: dict[str, float]
    launches: int
    asked: float
    longest: list[tuple[str, float]]


def kind_of(name: str) -> str:
    """Which kind a kernel is."""
    low = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in low for word in words)), OTHER)


def taken_apart(work: Callable[[], object], device: torch.device, show: int = 12) -> Kernels:
    """Run a piece of work twice: once for the CPU's share, once under the profiler. It must have been run before."""
    now(device)
    start = time.perf_counter()
    work()
    asked = time.perf_counter() - start
    now(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        work()
        now(device)
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    launches = 0
    for name, milliseconds, calls in _times(seen, device):
        kinds[kind_of(name)] += milliseconds
        names[name[:LONGEST_NAME]] += milliseconds
        launches += calls
    return Kernels(dict(_longest(kinds)), launches, asked * 1e3, _longest(names)[:show])


def _longest(times: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda pair: -pair[1])


def _times(seen: profile, device: torch.device) -> Iterator[tuple[str, float, int]]:
    """(name, milliseconds, calls) of all that the device did; on a CPU, of the operations without those inside them."""
    if device.type == "cuda":
        for event in seen.events() or ():
            if event.device_type == DeviceType.CUDA:
                yield event.name, event.time_range.elapsed_us() / 1e3, 1
    else:
        for event in seen.key_averages():
            if event.self_cpu_time_total and not event.key.startswith("ProfilerStep"):
                yield event.key, event.self_cpu_time_total / 1e3, event.count
