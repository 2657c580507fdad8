"""Dtypes of weights: what a file has, and what to load it in."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ..messages import shortened
from ..platforms import AVX2, has_bfloat16, platform_of
from .readers import CheckpointError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def stored_dtypes(tensors: dict[str, Tensor]) -> list[torch.dtype]:
    """Floating dtypes of the tensors, the one with the most values first."""
    sizes = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return [dtype for dtype, _ in sizes.most_common()]


def check_floating(tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless all tensors hold floating-point values, at least one each."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"the weights are quantised in a way that is not read here: {shortened(name)} is "
                f"{dtype_name(tensor.dtype)}. Use the bf16, fp16 or fp8 version."
            )
        if not tensor.numel():
            raise CheckpointError(f"{shortened(name)} has the shape {list(tensor.shape)[:8]}, and so no values.")


def choose_dtype(
    dtype: str | torch.dtype,
    tensors: dict[str, Tensor],
    device: torch.device | str,
    instead: torch.dtype = torch.float16,
) -> torch.dtype:
    """The dtype to load in: the one asked for, or for "auto" the file's own, float8 as bfloat16.

    On CUDA, "auto" loads float32 as bfloat16 too.

    instead: of bfloat16, where "auto" would choose it for a device that does not compute in it.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}")
        return DTYPES[dtype]
    stored = stored_dtypes(tensors)[0]
    if stored.itemsize >= 4 and torch.device(device).type != "cuda":
        return torch.float32
    if stored == torch.float16:
        return stored
    return torch.bfloat16 if has_bfloat16(platform_of(device)) else instead


def slow_dtype(asked: str | torch.dtype, chosen: torch.dtype, device: torch.device | str) -> str:
    """What to say of a dtype that "auto" has chosen where the processor has no products in it; "" elsewhere."""
    if asked != "auto" or chosen.itemsize >= 4 or torch.device(device).type != "cpu" or not AVX2:
        return ""
    return (
        f"this processor multiplies {dtype_name(chosen)} five to seven times as slowly as float32, for want of AVX-512: the dtype float32 is "
        "faster, in twice the memory"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, not `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
