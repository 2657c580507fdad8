"""CUDA graphs of whole model passes: a recorded pass is started as one, not kernel by kernel.

That helps where the CPU takes longer to launch the kernels than the GPU to run them: small models and pictures, chunks of
one frame. A graph repeats the same kernels on the same memory. So one graph serves every step once the window is full, and
another every context pass: what differs from pass to pass, the chunk's places in the cache too, comes in through tensors
that stay where they are. A prompt that takes the place of another one moves into the memory of that.
"""

from __future__ import annotations

import weakref
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

    cache: RollingKVCache  # graphs write and read its memory
    text: torch.Size  # of the prompt's embeddings
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


class PromptPlace:
    """The memory in which the recordings of a cache find their prompt, whichever that is by now."""

    def __init__(self):
        self._projected: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._last: Callable[[], PromptCache | None] = lambda: None

    def bring(self, prompt: PromptCache) -> bool:
        """Have a prompt lie here, in the place of the last one, which is as good as new then.

        False, and nothing is done, where not all of it is there yet that recordings read.
        """
        if prompt.layers is self._layers:
            return True
        if prompt.projected is None or not prompt.layers.keys() >= self._layers.keys():
            return False
        last = self._last()
        if last is not None and last.layers is self._layers:
            last.release()
        if self._projected is None:
            self._projected = torch.empty_like(prompt.projected)
        self._projected.copy_(prompt.projected)
        for layer, made in prompt.layers.items():
            if layer not in self._layers:
                self._layers[layer] = torch.empty_like(made[0]), torch.empty_like(made[1])
            for place, tensor in zip(self._layers[layer], made):
                place.copy_(tensor)
        prompt.projected, prompt.layers = self._projected, self._layers
        self._last = weakref.ref(prompt)  # what no session needs any more is not kept here
        return True


class PassGraphs:
    """Runs passes, and from the second one with the same key on repeats a recording of them.

    The first one runs as it is, and so does a prompt's first one: it also fills what is computed once per prompt.

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
        self._places: dict[RollingKVCache, PromptPlace] = {}

    def run(self, key: PassKey, prompt: PromptCache, forward: Forward, *inputs: Tensor) -> Tensor | None:
        """What `forward(*inputs)` gives, in memory of its own. prompt: that `forward` reads."""
        if (at := self.addresses()) != self._at:
            self.clear()
            self._at = at
        if key not in self._seen:
            self._forget_other_sizes(key)
            self._seen.add(key)
            return forward(*inputs)
        if not self._places.setdefault(key.cache, PromptPlace()).bring(prompt):
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
        self._places.clear()

    def _forget_other_sizes(self, key: PassKey) -> None:
        """Graphs of this cache for embeddings of another size only hold a prompt's memory."""
        for known in [known for known in self._seen if known.cache is key.cache and known.text != key.text]:
            self._seen.discard(known)
            self._recorded.pop(known, None)
            self._places.pop(key.cache, None)
