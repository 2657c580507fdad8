"""The attention processors that an attachment puts into the blocks of a stock transformer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ..rope import rotate
from .context import PassContext
from .execution import eager
from .fused import rms_norm_


class RollingSelfAttention:
    """Self-attention of one block over the frames in the window. A diffusers attention processor."""

    _parallel_config = None

    def __init__(self, context: PassContext, layer: int):
        self.context = context
        self.layer = layer
        self._attention_backend = context.execution.backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Any = None):
        """hidden_states: [B, S, dim], the tokens of the open chunk. rotary_emb: see `rope.rotate`."""
        query = rotate(self._heads(attn, attn.to_q(hidden_states), attn.norm_q), rotary_emb)
        key, value = self.key_value(attn, hidden_states, rotary_emb)
        return project(attn, self._attend(query, key, value))

    @eager
    def _attend(self, query, key, value):
        key, value = self.context.running.branch.cache.update(self.layer, key, value)
        return attend(self, query, key, value)

    def key_value(self, attn, hidden_states, rotary_emb) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's own keys, after RoPE, and values, [B, S, H, D] each."""
        key = rotate(self._heads(attn, attn.to_k(hidden_states), attn.norm_k), rotary_emb)
        return key, attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))

    def _heads(self, attn, projected, norm):
        return normalise(projected, norm, self.context.execution.exact).unflatten(2, (attn.heads, -1))


class PromptCrossAttention:
    """Cross-attention of one block; the prompt's keys and values are computed once. A diffusers attention processor."""

    _parallel_config = None

    def __init__(self, context: PassContext, layer: int):
        self.context = context
        self.layer = layer
        self._attention_backend = context.execution.backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """hidden_states: [B, S, dim]; encoder_hidden_states: the projected prompt, [B, L, dim]."""
        query = normalise(attn.to_q(hidden_states), attn.norm_q, self.context.execution.exact)
        return project(attn, self._attend(attn, query.unflatten(2, (attn.heads, -1)), encoder_hidden_states))

    @eager
    def _attend(self, attn, query, encoder_hidden_states):
        layers = self.context.running.branch.prompt.layers
        if self.layer not in layers:
            key = normalise(attn.to_k(encoder_hidden_states), attn.norm_k, self.context.execution.exact)
            value = attn.to_v(encoder_hidden_states)
            layers[self.layer] = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
        return attend(self, query, *layers[self.layer])


def attend(processor, query, key, value) -> torch.Tensor:
    # A float32 norm weight in a half-precision model lifts the query: keys and values decide the dtype.
    return dispatch_attention_fn(
        query.to(key.dtype), key, value, backend=processor._attention_backend, parallel_config=None
    )


def project(attn, heads) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](heads.flatten(2, 3)))


def normalise(hidden_states: torch.Tensor, norm, exact: bool) -> torch.Tensor:
    """Normalise the fresh output of a projection; it may be overwritten."""
    if not exact:
        fits = hidden_states.device.type == "cpu" and hidden_states.dtype == norm.weight.dtype == torch.float32
        return rms_norm_(hidden_states, norm) if fits else norm(hidden_states)
    # The original's order of operations; torch's fused kernel differs from it in the last bit.
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return wide.type_as(hidden_states) * norm.weight
