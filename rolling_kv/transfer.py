"""Bringing what the CPU has made to the device, without waiting for what the device is doing."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`; itself where it is there already. It must not be changed afterwards.

    An ordinary copy to CUDA waits until the device has done everything before it, and then the device waits for the
    CPU. From pinned memory it takes its turn.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # MPS does not keep such copies in order with the rest
