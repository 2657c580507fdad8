"""Fast passes where a device does not have them: the same roundings, by operations that every device has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from ...float8_linear import FLOAT8
from ...wan import fast, processors

QUERIES, KEYS = 128, 64
"""Tokens that share a scale, as in SageAttention 2."""
LARGEST = torch.finfo(FLOAT8).max


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


@contextmanager
def fast_passes(*, products: bool, attention: bool) -> Iterator[None]:
    """Lets fast passes have what is asked for, and nothing else, wherever they run.

    Products in float8 are PyTorch's own on every device. Attention is imitated.
    """

    def dispatch(query, key, value, **_):
        return attention_in_8_bits(query, key, value)

    def answer(device, dtype, head_dim, chosen, fused):
        return fast.Fast(chosen, products, "")

    attend = dispatch if attention else processors.dispatch_attention_fn
    with mock.patch.object(fast, "fast_on", answer), mock.patch.object(processors, "dispatch_attention_fn", attend):
        yield
