"""What devices differ in: bringing to one what the CPU has made, without waiting for it, and whether it has float64."""

from __future__ import annotations

import torch

FLOAT64 = ("cpu", "cuda", "meta")
"""Types of devices that compute in float64. MPS and many others do not."""


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
