"""What fast passes are made of on a device: attention in 8 bits and products in float8, and what is used where these are missing."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from ..config import ExecutionConfig
from ..platforms import has_float8_products, platform_of, runs_flash_3
from . import float8_attention, products
from .float8_attention import FLASH_3, FLASH_3_FLOAT8
from .fused import kernels_run_on
from .offloaded import offloaded_blocks

logger = logging.getLogger(__name__)

BACKENDS = {
    "sage": "SageAttention, in 8 bits",
    FLASH_3_FLOAT8: "FlashAttention 3, in float8",
    FLASH_3: "FlashAttention 3, in 16 bits",
}
"""Attention backends that are tried for fast passes, the best first, and what they are.

SageAttention has the rate of float8, too, and adds up long sums in float32, where Hopper's products of float8 keep fewer bits.
"""
IN_8_BITS = ("sage", FLASH_3_FLOAT8)
OFF = 0.1
"""How far attention in 8 bits may be off in the 2-norm, with random numbers of size 1, which are its worst."""


class Fast(NamedTuple):
    """What fast passes use.

    backend: of attention; None for PyTorch's own. products: whether those in float8. remark: what is used in the place of
    what is missing, in a sentence; empty where nothing is.
    """

    backend: str | None
    products: bool
    remark: str


@lru_cache
def fast_on(
    device: torch.device, dtype: torch.dtype, head_dim: int, chosen: str | None = None, fused: bool = True
) -> Fast:
    """What a model that computes in a dtype, with heads of that size, uses on a device. What is installed is tried once.

    chosen: the attention backend, where somebody has. fused: whether rows are quantised in one kernel, by Triton or as they
        are compiled: in several that takes longer than float8 saves.
    """
    backend, instead = chosen, []
    if chosen is None:
        reasons = {name: _why_not(name, device, dtype, head_dim) for name in BACKENDS}
        backend = next((name for name, reason in reasons.items() if not reason), None)
        if backend not in IN_8_BITS:
            used = BACKENDS[backend] if backend else "PyTorch's attention"
            instead.append(f"{used} ({reasons['sage']})")
    no_products = _why_no_products(device, dtype, fused)
    if no_products:
        instead.append(f"products in {str(dtype).removeprefix('torch.')} ({no_products})")
    remark = f"Fast passes use {' and '.join(instead)}." if instead else ""
    return Fast(backend, not no_products, remark)


def _why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend cannot attend there; empty where it can."""
    if device.type != "cuda":
        return "attention in 8 bits needs a CUDA GPU"
    if dtype.itemsize != 2:
        return "attention in 8 bits takes bfloat16 and float16"
    if backend != "sage" and not runs_flash_3(platform_of(device)):
        return "FlashAttention 3 needs an H100"
    try:
        ExecutionConfig(backend=float8_attention.beside(backend)).check(device)
    except ValueError:
        return f"{BACKENDS[backend].partition(',')[0]} is not installed"
    try:
        error = _error_of(backend, device, dtype, head_dim)
    except Exception as raised:
        return f"{BACKENDS[backend].partition(',')[0]} cannot attend here: {_first_line(raised)}"
    return "" if error <= OFF else f"{BACKENDS[backend].partition(',')[0]} is off by {error:.2g} here"


def _error_of(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, 2, head_dim, generator=random).to(device, dtype) for tokens in (192, 320, 320)
    )
    if backend == FLASH_3_FLOAT8:
        made = float8_attention.attention(query, key, value).float()
    else:
        named = AttentionBackendName(backend)
        made = dispatch_attention_fn(query, key, value, backend=named, parallel_config=None).float()
    q, k, v = (heads.float().transpose(1, 2) for heads in (query, key, value))
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return float((made - plain).norm() / plain.norm())


def _why_no_products(device: torch.device, dtype: torch.dtype, fused: bool) -> str:
    if not has_float8_products(platform_of(device)):
        return "float8 ones need an NVIDIA GPU from RTX 40 or H100 on"
    if dtype != torch.bfloat16:
        return "float8 ones give bfloat16"
    if not fused:
        return "float8 ones are faster with Triton or torch.compile only"
    try:
        products.check(device)
    except Exception as raised:
        return f"float8 ones cannot be had here: {_first_line(raised)}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def fast_for(execution: ExecutionConfig, transformer, device: torch.device) -> Fast:
    """What passes of a transformer use on the device that it is going to run on."""
    if not execution.fast:
        return Fast(execution.backend, False, "")
    dtype = transformer.patch_embedding.weight.dtype
    fused = execution.compile or (not execution.plain and kernels_run_on(device))
    made = fast_on(device, dtype, transformer.config.attention_head_dim, execution.backend, fused)
    if made.products and offloaded_blocks(transformer) is not None:
        narrow = f"Fast passes use products in {str(dtype).removeprefix('torch.')} (the weights lie in CPU memory)."
        made = made._replace(products=False, remark=f"{made.remark} {narrow}".strip())
    return made


def product_bytes(execution: ExecutionConfig, transformer, device: torch.device) -> int:
    """Bytes that passes of a transformer take for weights in float8, on the device that it is going to run on."""
    return products.bytes_of(transformer) if fast_for(execution, transformer, device).products else 0


@lru_cache
def say_once(remark: str) -> None:
    """Say what fast passes do without, unless that has been said."""
    if remark:
        logger.warning(remark)
