"""CPU memory beside a device: as much as is asked for, and pinned for CUDA, which then copies while others compute.

torch's own pinned memory comes in powers of two and is never given back.
"""

from __future__ import annotations

import logging
import math
import mmap
import weakref
from typing import Any

import numpy as np
import torch

from ..devices import check_memory
from .codecs import CODECS

logger = logging.getLogger(__name__)
PORTABLE = 1
"""Flag of `cudaHostRegister`: pinned for every CUDA device, not for the current one alone."""


def check_room(nbytes: int) -> None:
    """Raise ValueError if `nbytes` of offloaded keys and values are more than the RAM that is available now."""
    smaller = " or ".join(name for name in CODECS if name != "model")
    check_memory(
        nbytes,
        "offloading the cache",
        f"close other programs, make the window or the video smaller, keep the cache as {smaller}, or turn offload off",
    )


class HostMemory:
    """Allocates tensors in CPU memory for copies to and from `device`. pinned: whether the next one will be."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pinned = device.type == "cuda"

    def zeros(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros; where it cannot be pinned, ordinary memory, with one warning."""
        if not self.pinned:
            return torch.zeros(size, dtype=dtype)
        nbytes = math.prod(size) * dtype.itemsize
        pages = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = np.zeros(pages + mmap.PAGESIZE, np.uint8)
        start = -memory.ctypes.data % mmap.PAGESIZE  # whole pages, which no other tensor shares
        self._pin(memory, memory.ctypes.data + start, pages)
        return torch.from_numpy(memory[start : start + nbytes]).view(dtype).view(size)

    def _pin(self, memory: np.ndarray, address: int, nbytes: int) -> None:
        with torch.cuda.device(self.device):
            error = int(_cudart().cudaHostRegister(address, nbytes, PORTABLE))
        if not error:
            # The tensor holds the array. When the process ends, CUDA may be gone before it.
            weakref.finalize(memory, _unpin, address, self.device).atexit = False
            return
        self.pinned = False
        logger.warning(
            "CUDA cannot pin %.2f GiB of RAM (error %d): what is offloaded is kept in ordinary memory, and passes "
            "wait for its copies",
            nbytes / 2**30,
            error,
        )
        _forget_error(self.device)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _forget_error(device: torch.device) -> None:
    """Let a kernel report the error that CUDA has returned, rather than the next one of somebody else's."""
    try:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError:
        pass


def _unpin(address: int, device: torch.device) -> None:
    try:
        torch.cuda.synchronize(device)  # copies to and from it may still run
    finally:
        with torch.cuda.device(device):
            _cudart().cudaHostUnregister(address)
