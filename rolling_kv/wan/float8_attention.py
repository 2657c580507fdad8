"""Attention in float8 by FlashAttention 3, on Hopper: twice the rate of its products in 16 bits.

Queries, keys and values have a scale each for every video and head, as the library takes them. What a cache keeps in
float8 is attended to as it lies: nothing is widened, and nothing is quantised but the queries.
"""

from __future__ import annotations

from importlib import import_module

import torch

from ..float8_linear import FLOAT8

FLASH_3 = "_flash_3"
FLASH_3_FLOAT8 = "_flash_3_float8"
"""What it is called among the backends of fast passes; it is none of diffusers' own."""
LARGEST = torch.finfo(FLOAT8).max


def beside(backend: str | None) -> str | None:
    """The backend for attention to a prompt, whose few keys are not worth quantising: the same library in 16 bits."""
    return FLASH_3 if backend == FLASH_3_FLOAT8 else backend


def quantised(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, S, H, D] in float8, and what each head was divided by, float32 [B, H]; None for what is in float8 already."""
    if heads.dtype == FLOAT8:
        return heads, None
    largest = torch.linalg.vector_norm(heads, torch.inf, dim=(1, 3), dtype=torch.float32)
    scales = largest.clamp(min=1e-12) / LARGEST
    # The quotient is float32 and rounded as it is stored: a GPU makes no float32 copy.
    codes = torch.empty(heads.shape, dtype=FLOAT8, device=heads.device)
    return torch.div(heads, scales[:, None, :, None], out=codes), scales


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention without a mask, [B, S, H, D] each. Keys and values may be in float8 already; the query says the dtype."""
    (q, q_scale), (k, k_scale), (v, v_scale) = map(quantised, (query, key, value))
    attend = import_module("flash_attn_interface").flash_attn_func
    made = attend(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
    # Before July 2025 the library returned the sums of the weights, too; it always returns bfloat16.
    return (made[0] if isinstance(made, tuple) else made).to(query.dtype)
