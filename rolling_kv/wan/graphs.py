"""CUDA graphs of whole model passes: a recorded pass is started as one, not kernel by kernel.

That helps where the CPU takes longer to launch the kernels than the GPU to run them: small models and pictures, chunks of
one frame. A graph repeats the same kernels on the same memory. So one graph serves every step once the window is full, and
another every context pass: what differs from pass to pass, the chunk's places in the cache too, comes in through tensors
that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cache.prompt import PromptCache
from ..cache.rolling import RollingKVCache

Forward = Callable[..., Tensor | None]
"""A pass as a function of tensors alone; all else that it reads is the same whenever its key is."""


class PassKey(NamedTuple):
    """What the CPU decides about a pass. Passes with equal keys differ in their tensors only."""

    cache: RollingKVCache  # graphs write and read its memory, and that of the prompt's cache
    prompt: PromptCache
    shape: torch.Size
    time_rows: int
    framewise: bool
    keys_only: bool


class Recorded(NamedTuple):
    """A recorded pass: how to repeat it, and where its inputs and its result lie."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    output: Tensor | None


class CudaRecorder:
    """Records what a function does on `device` as a CUDA graph. All graphs share one pool of memory: they never run at
    once.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)  # torch's own is on whichever device was current first

    def __call__(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        """Record `run` without running it; returns how to repeat it, and where its result will lie."""

        def replay():
            with torch.cuda.device(self.device):
                graph.replay()

        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = run()
        return replay, output


class Addresses:
    """Where the parameters and buffers of a module lie. Looked at before every pass, so the module tree is walked once."""

    def __init__(self, module: nn.Module):
        tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
        self._tables = [table for table in tables if table]

    def __call__(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for table in self._tables for tensor in table.values() if tensor is not None)


class PassGraphs:
    """Runs passes, and from the second one with the same key on repeats a recording of them.

    The first one runs as it is: it also fills what is computed once per prompt.

    record: see `CudaRecorder`.
    addresses: of what passes read beside their inputs and the caches. Recordings go when one of them changes, as where
        weights have been in CPU memory meanwhile.
    """

    def __init__(self, record: Callable, addresses: Callable[[], tuple[int, ...]]):
        self.record = record
        self.addresses = addresses
        self._at: tuple[int, ...] = ()
        self._seen: set[PassKey] = set()
        self._recorded: dict[PassKey, Recorded] = {}

    def run(self, key: PassKey, forward: Forward, *inputs: Tensor) -> Tensor | None:
        """What `forward(*inputs)` gives, in memory of its own."""
        if (at := self.addresses()) != self._at:
            self.clear()
            self._at = at
        if key not in self._seen:
            self._forget_other_prompts(key)
            self._seen.add(key)
            return forward(*inputs)
        if key not in self._recorded:
            places = tuple(tensor.clone() for tensor in inputs)
            replay, output = self.record(lambda: forward(*places))
            self._recorded[key] = Recorded(replay, places, output)
        replay, places, output = self._recorded[key]
        for place, tensor in zip(places, inputs):
            place.copy_(tensor)
        replay()
        return None if output is None else output.clone()

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        self._seen.clear()
        self._recorded.clear()

    def _forget_other_prompts(self, key: PassKey) -> None:
        """After a switch, graphs of this cache with another prompt only hold that prompt's memory."""
        for known in [known for known in self._seen if known.cache is key.cache and known.prompt is not key.prompt]:
            self._seen.discard(known)
            self._recorded.pop(known, None)
