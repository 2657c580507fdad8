"""Devices and memory: which can be used here, what they differ in, how tensors reach them, and what RAM is left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)

KNOWN = ("cpu", "cuda", "mps", "xpu")
"""Types of devices that people have."""

FLOAT64 = ("cpu", "cuda", "meta")
"""Types of devices that compute in float64. MPS and many others do not."""


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError, with those that are there, unless torch can compute on it here."""
    if reason := _why_unusable(name):
        here = ", ".join(known for known in KNOWN if not _why_unusable(known))
        raise ValueError(f"the device {str(name)!r} cannot be used here ({reason}); these can: {here}")
    return torch.device(name)


def _why_unusable(name: str | torch.device) -> str:
    try:
        torch.ones(1, device=torch.device(name)).item()
    except Exception as error:  # AssertionError, RuntimeError, ImportError and others, by the device
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ""


def check_memory(nbytes: int, what: str, remedy: str) -> None:
    """Raise ValueError if `nbytes` are more than the RAM that is available now, whatever limit a container may have.

    what: needs them. remedy: what a person can do about it.
    """
    available = available_memory()
    if nbytes > available:
        raise ValueError(
            f"{what} needs {nbytes / 2**30:.1f} GiB of RAM, and {available / 2**30:.1f} GiB are available: {remedy}"
        )


def available_memory() -> int:
    """Bytes of RAM that can be had now."""
    return psutil.virtual_memory().available


def obtainable_memory(device: torch.device) -> int:
    """Bytes of a device's memory that this process can have, those that it has already included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_memory() + psutil.Process().memory_info().rss


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left; each device and library has its own."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error)
    said = "out of memory" in text.lower() or "DefaultCPUAllocator" in text or "ALLOC_FAILED" in text
    return isinstance(error, RuntimeError) and said


class OutOfMemory(ValueError):
    """The memory of a device is used up. The message is for people."""


def has_float64(device: torch.device) -> bool:
    """Whether tensors on `device` can be float64."""
    return device.type in FLOAT64


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`; itself where it is there already. It must not be changed afterwards.

    An ordinary copy to CUDA waits until the device has done everything before it, and then the device waits for the
    CPU. From pinned memory it takes its turn.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # MPS does not keep such copies in order with the rest


class Beside:
    """What a CUDA device does beside everything else, in a stream of its own.

        turn = beside.after_all()  # in the thread that hands the work over
        with turn:                 # in the one that does it
            frames = decode(latents.to(device)).cpu()

    Only tensors of the CPU go in and come out: what is made in the stream is freed in it.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def after_all(self) -> AbstractContextManager[None]:
        """A turn in the stream, which begins when the device has done all that it was told so far: weights are there by then,
        though they may still be on their way now.
        """
        return self._turn(torch.cuda.current_stream(self.stream.device).record_event())

    @contextmanager
    def _turn(self, ready: Any) -> Iterator[None]:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            yield


def beside(device: torch.device) -> Beside | None:
    """For what is decoded beside the sampling; None elsewhere than on CUDA, where both share the processor."""
    return Beside(device) if device.type == "cuda" else None


@lru_cache
def checked_kernels(load: Callable[[], ModuleType], device: torch.device) -> ModuleType | None:
    """A module of Triton kernels, where Triton is there and they give on a device what the plain paths give; else None.

    load: imports it. Its function `check` tries the kernels on a device. Says once why they cannot be used, as where Triton
    finds no C compiler.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    kernels = load()
    try:
        with torch.cuda.device(device):
            kernels.check(device)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(f"Triton cannot make kernels here ({reason[-1]}): PyTorch's own are used, a little slower")
        return None
    return kernels
