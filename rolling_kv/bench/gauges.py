"""The time, and the peak memory of a chunk. Needs torch alone: another program's Python may import it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, for devices whose allocator does not: the CPU.

    While it is active, the storage of every operation's result is counted until it is freed. What was there before is
    counted by the caller, in `live`. Scratch space inside one operation is not seen. It makes each operation slower, so
    it has no place in a timed run. A process's resident size would be no substitute: it holds libraries, and what the C
    library keeps of memory that others have freed.
    """

    def __init__(self, live: int = 0):
        super().__init__()
        self.live = self.peak = live
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs)):
            self._note(tensor.untyped_storage(), 0)  # of before, or counted already
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            self._note(storage, storage.nbytes())
        return result

    def restart(self) -> None:
        """Begin the next peak."""
        self.peak = self.live

    def _note(self, storage: torch.UntypedStorage, count: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += count
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, count)

    def _freed(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count


class AllocatedBytes:
    """What `TensorBytes` tells, by the allocator of a CUDA device: it costs no time, and sees what libraries allocate through it."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> AllocatedBytes:
        self._before = torch.cuda.memory_allocated(self.device)
        self.restart()
        return self

    def __exit__(self, *exception) -> None: ...

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self._before

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self._before

    def restart(self) -> None:
        """Begin the next peak."""
        torch.cuda.reset_peak_memory_stats(self.device)


def memory_beside(device: torch.device) -> AllocatedBytes | TensorBytes:
    """Counts what is allocated inside a `with` block, beside what was there before: `live` now, `peak` since `restart`."""
    return AllocatedBytes(device) if device.type == "cuda" else TensorBytes()


class CudaGauge:
    """Tells apart what several methods have allocated on one CUDA device, by taking turns. Costs no time to speak of.

    shared: bytes that were there before and that all of them use. peaks: by name, of the latest turn, shared included.
    """

    def __init__(self, device: torch.device, shared: int):
        self.device = device
        self.shared = shared
        self.peaks: dict[str, int] = {}
        self._standing: dict[str, int] = {}  # what each has kept from its turns so far

    @contextmanager
    def turn(self, name: str):
        """Everything allocated inside is charged to `name`."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        standing = self._standing.get(name, 0)
        self.peaks[name] = torch.cuda.max_memory_allocated(self.device) - before + standing + self.shared
        self._standing[name] = standing + torch.cuda.memory_allocated(self.device) - before


def tensors_in(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def storage_bytes(tensors) -> int:
    """Bytes of the memory behind tensors; what several of them share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def turns(work: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds that each of several turns of a piece of work takes; the device is waited for between them."""
    seconds = []
    for _ in range(count):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return seconds
