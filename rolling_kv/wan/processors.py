"""The attention processors that an attachment puts into the blocks of a stock transformer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ..rope import rotate
from . import float8_attention
from .context import PassContext
from .execution import eager
from .float8_attention import FLASH_3_FLOAT8
from .fused import fuses_half, is_linear, is_plain, rms_norm_


class RollingSelfAttention:
    """Self-attention of one block over the frames in the window. A diffusers attention processor."""

    _parallel_config = None

    def __init__(self, context: PassContext, layer: int):
        self.context = context
        self.layer = layer
        self._attention_backend = context.execution.backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Any = None):
        """hidden_states: [B, S, dim], the tokens of the open chunk. rotary_emb: see `rope.rotate`."""
        if self._by_kernels(hidden_states):
            return project(attn, self._attend_by_kernels(attn, hidden_states, rotary_emb))
        query = self._turned(attn, attn.to_q, attn.norm_q, hidden_states, rotary_emb)
        key, value = self.key_value(attn, hidden_states, rotary_emb)
        return project(attn, self._attend(query, key, value))

    @property
    def _as_kept(self) -> bool:
        return self._attention_backend == FLASH_3_FLOAT8

    def _by_kernels(self, hidden_states) -> bool:
        return self.context.kernels is not None and self.context.shards is None and fuses_half(hidden_states)

    def _attend_by_kernels(self, attn, hidden_states, rotary_emb):
        """The same with kernels, which make keys as they write them into the cache."""
        query, key = (made(hidden_states).unflatten(2, (attn.heads, -1)) for made in (attn.to_q, attn.to_k))
        query = self._turn(attn.norm_q, rotary_emb).turned(query)
        value = self._values(attn, hidden_states)
        if value is None:
            turn, cache = self._turn(attn.norm_k, rotary_emb), self.context.running.branch.cache
            return attend(self, query, *cache.update(self.layer, key, None, turn))
        return joined(
            attend(
                self,
                query,
                *branch.cache.update(
                    self.layer, key, value, self._turn(attn.norm_k, rotation), self.context.slots, self._as_kept
                ),
            )
            for branch, (query, key, value, rotation) in self.context.running.apart(query, key, value, rotary_emb)
        )

    def _values(self, attn, hidden_states) -> torch.Tensor | None:
        """The chunk's values, [B, S, H, D]; None where the product has left them in the cache, which saves a copy."""
        context, linear = self.context, attn.to_v
        alone = len(hidden_states) == 1 == len(context.running.branches) and context.slots is None
        if alone and is_linear(linear) and linear.weight.dtype == hidden_states.dtype:
            rows = context.running.branch.cache.value_rows(self.layer)
            if rows is not None and rows[0][1].dtype == hidden_states.dtype:
                for source, into in rows:
                    tokens = hidden_states[0, source : source + into.shape[1]]
                    torch.addmm(linear.bias, tokens, linear.weight.t(), out=into[0].flatten(1))
                return None
        return linear(hidden_states).unflatten(2, (attn.heads, -1))

    def _turn(self, norm, rotation):
        return self.context.kernels.Turn(norm.weight, norm.eps, rotation)

    def write_of(self, attn, hidden_states, rotary_emb) -> None:
        """Write the keys and values of [B, S, dim], and attend to nothing."""
        if not self._by_kernels(hidden_states):
            self.write(*self.key_value(attn, hidden_states, rotary_emb))
            return
        key, value = attn.to_k(hidden_states).unflatten(2, (attn.heads, -1)), self._values(attn, hidden_states)
        if value is None:
            self.context.running.branch.cache.write(self.layer, key, None, self._turn(attn.norm_k, rotary_emb))
            return
        for branch, (own, values, rotation) in self.context.running.apart(key, value, rotary_emb):
            branch.cache.write(self.layer, own, values, self._turn(attn.norm_k, rotation), self.context.slots)

    @eager
    def _attend(self, query, key, value):
        shards, context = self.context.shards, self.context
        if shards is not None:
            query, key, value = shards.to_heads(context.frames, query, key, value)
        heads = joined(
            attend(
                self, query, *branch.cache.update(self.layer, key, value, slots=context.slots, as_kept=self._as_kept)
            )
            for branch, (query, key, value) in context.running.apart(query, key, value)
        )
        return heads if shards is None else shards.to_tokens(context.frames, heads)

    @eager
    def write(self, key, value) -> None:
        """Write the chunk's keys and values of this block, [B, S, H, D] each, and attend to nothing."""
        if (shards := self.context.shards) is not None:
            key, value = shards.to_heads(self.context.frames, key, value)
        for branch, (own, values) in self.context.running.apart(key, value):
            branch.cache.write(self.layer, own, values, slots=self.context.slots)

    def key_value(self, attn, hidden_states, rotary_emb) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's own keys, after RoPE, and values, [B, S, H, D] each."""
        key = self._turned(attn, attn.to_k, attn.norm_k, hidden_states, rotary_emb)
        return key, attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))

    def _turned(self, attn, linear, norm, hidden_states, rotary_emb):
        ours = are_ours(linear, norm)
        normed = normalise(linear(hidden_states), norm, self.context.execution.exact, ours)
        turned = self.context.rotate or partial(rotate, overwrite=ours)
        return turned(normed.unflatten(2, (attn.heads, -1)), rotary_emb)


class PromptCrossAttention:
    """Cross-attention of one block; the prompt's keys and values are computed once. A diffusers attention processor."""

    _parallel_config = None

    def __init__(self, context: PassContext, layer: int):
        self.context = context
        self.layer = layer
        self._attention_backend = float8_attention.beside(context.execution.backend)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """hidden_states: [B, S, dim]; encoder_hidden_states: the projected prompt, [B, L, dim]."""
        exact, ours = self.context.execution.exact, are_ours(attn.to_q)
        query = normalise(attn.to_q(hidden_states), attn.norm_q, exact, ours)
        return project(attn, self._attend(attn, query.unflatten(2, (attn.heads, -1)), encoder_hidden_states))

    @eager
    def _attend(self, attn, query, encoder_hidden_states):
        together = self.context.running.apart(query, encoder_hidden_states)
        return joined(attend(self, query, *self._seen(attn, branch.prompt, text)) for branch, (query, text) in together)

    def _seen(self, attn, prompt, text) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a prompt in this block. text: the projected prompt, [B, L, dim]."""
        if self.layer not in prompt.layers:
            key = normalise(attn.to_k(text), attn.norm_k, self.context.execution.exact, are_ours(attn.to_k))
            value = attn.to_v(text)
            prompt.layers[self.layer] = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
        return prompt.layers[self.layer]


def attend(processor, query, key, value) -> torch.Tensor:
    # A float32 norm weight in a half-precision model lifts the query: keys and values decide the dtype.
    if processor._attention_backend == FLASH_3_FLOAT8:
        dtype = processor.context.running.branch.cache.shape.dtype
        return float8_attention.attention(query.to(dtype), key, value)
    return dispatch_attention_fn(
        query.to(key.dtype), key, value, backend=processor._attention_backend, parallel_config=None
    )


def joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The videos of a pass as one batch again."""
    first, *others = parts
    return torch.cat([first, *others]) if others else first


def project(attn, heads) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](heads.flatten(2, 3)))


def are_ours(*modules) -> bool:
    """Whether nobody else can hold what these return, as a hook may: else it must not be overwritten."""
    return torch.compiler.is_compiling() or all(map(is_plain, modules))


def normalise(hidden_states: torch.Tensor, norm, exact: bool, overwrite: bool = True) -> torch.Tensor:
    """Normalise the output of a projection; overwrite: nobody else holds it."""
    if not exact:
        fits = hidden_states.device.type == "cpu" and hidden_states.dtype == norm.weight.dtype == torch.float32
        return rms_norm_(hidden_states if overwrite else hidden_states.clone(), norm) if fits else norm(hidden_states)
    # The original's order of operations; torch's fused kernel differs from it in the last bit.
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return wide.type_as(hidden_states) * norm.weight
