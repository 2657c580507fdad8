"""Fast passes where a device does not have them: the same roundings, by operations that every device has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from ...float8_linear import FLOAT8
from ...wan import fast, processors
from ...wan.float8_attention import FLASH_3_FLOAT8

QUERIES, KEYS = 128, 64
"""Tokens that share a scale, as in SageAttention 2."""
LARGEST = torch.finfo(FLOAT8).max
HEAVIEST = 256
"""What FlashAttention 3 makes of the largest weight before it rounds weights to float8."""


def attention_in_8_bits(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SageAttention 2's roundings, [B, S, H, D] each: int8 products of queries and keys, float8 ones of weights and values.

    Keys lose their mean over the tokens before, which changes no weight. See https://arxiv.org/abs/2411.10958.
    """
    wide = (heads.float().transpose(1, 2) for heads in (query, key, value))
    queries, keys, values = wide
    keys = _in_int8(keys - keys.mean(2, keepdim=True), KEYS)
    scores = _in_int8(queries, QUERIES) @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    scale = values.abs().amax(2, keepdim=True).clamp(min=1e-12) / LARGEST
    seen = (weights * LARGEST).to(FLOAT8).float() @ (values / scale).to(FLOAT8).float() * scale / LARGEST
    return (seen / weights.sum(-1, keepdim=True)).transpose(1, 2).to(query.dtype)


def _in_int8(heads: Tensor, tokens: int) -> Tensor:
    """[B, H, S, D], rounded to int8 with one scale for each `tokens` tokens of a head."""
    return torch.cat([_rounded(part) for part in heads.split(tokens, 2)], 2)


def _rounded(part: Tensor) -> Tensor:
    scale = part.abs().amax((2, 3), keepdim=True).clamp(min=1e-12) / 127
    return (part / scale).round() * scale


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, q_descale=None, k_descale=None, v_descale=None) -> Tensor:
    """FlashAttention 3's for float8, [B, S, H, D] each, with a scale for each video and head, [B, H]; None: 1.

    Scores and sums are float32, where Hopper's products of float8 keep fewer bits of a sum. See
    https://github.com/Dao-AILab/flash-attention/blob/main/hopper/softmax.h.
    """
    queries, keys, values = (
        heads.float().transpose(1, 2) * (1 if scale is None else scale[:, :, None, None])
        for heads, scale in ((q, q_descale), (k, k_descale), (v, v_descale))
    )
    scores = queries @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * HEAVIEST
    seen = weights.to(FLOAT8).float() @ values
    return (seen / weights.sum(-1, keepdim=True)).transpose(1, 2).bfloat16()


@contextmanager
def fast_passes(*, products: bool, attention: bool, flash: bool = False) -> Iterator[None]:
    """Lets fast passes have what is asked for, and nothing else, wherever they run.

    Products in float8 are PyTorch's own on every device. Attention is imitated: SageAttention's in 8 bits, or FlashAttention
    3's in float8.
    """
    plain = processors.dispatch_attention_fn

    def dispatch(query, key, value, **_):
        return attention_in_8_bits(query, key, value) if attention else plain(query, key, value, parallel_config=None)

    def answer(device, dtype, head_dim, chosen, fused):
        return fast.Fast(FLASH_3_FLOAT8 if flash else chosen, products, "")

    attend = dispatch if attention or flash else plain
    library = {"flash_attn_interface": SimpleNamespace(flash_attn_func=flash_attn_func)} if flash else {}
    with (
        mock.patch.object(fast, "fast_on", answer),
        mock.patch.object(processors, "dispatch_attention_fn", attend),
        mock.patch.dict(sys.modules, library),
    ):
        yield
