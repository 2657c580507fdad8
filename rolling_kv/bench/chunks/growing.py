"""A cache that grows: a new tensor on every pass, trimmed after it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ...geometry import WAN_21
from ...rope import rotary_angles, rotate, rotations
from ..gauges import storage_bytes
from .contenders import StockSteps
from .experiment import Workload


class Growing(StockSteps):
    """(c) A cache that is concatenated on every pass and trimmed after it: diffusers pull request #13569.

    As there, the first step of a chunk appends, the later ones and the context pass overwrite, the text is projected on
    every pass, and there is no sink. Positions are absolute, as the engine has them.
    """

    letter = "c"
    title = "grow and trim with torch.cat (#13569)"
    note = "the first step of a chunk attends to window + chunk; context pass in full, after every chunk"

    def __init__(self, workload: Workload, weights: dict[str, Tensor]):
        super().__init__(workload, weights)
        window = workload.cache.limit
        limit = None if window is None else window * workload.tokens_per_frame
        transformer: Any = self.transformer  # diffusers' annotations know its own parts alone
        self.attentions = [GrowingSelfAttention(limit) for _ in transformer.blocks]
        for block, attention in zip(transformer.blocks, self.attentions):
            block.attn1.processor = attention
        self.positions = transformer.rope = _Positions(workload)

    def chunk(self, index):
        self.positions.move_to(index * self.workload.chunk_shape[2])
        for attention in self.attentions:
            attention.overwriting = False
        latents = self.sample(index)
        with torch.inference_mode():
            super().flow(latents, self.workload.sampling.context_noise)
        return latents

    def flow(self, latents, timestep):
        flow = super().flow(latents, timestep)
        for attention in self.attentions:
            attention.overwriting = True
        return flow

    @property
    def kv_bytes(self):
        return sum(attention.nbytes for attention in self.attentions)


class _Positions(nn.Module):
    """In the place of a transformer's rotary embedding: the rotation for a chunk that starts at any frame."""

    def __init__(self, workload: Workload):
        super().__init__()
        self.workload = workload

    def move_to(self, start: int) -> None:
        frames, height, width = self.workload.chunk_shape[2:]
        head_dim = self.workload.size.dim // self.workload.size.heads
        rotation = rotations(rotary_angles(head_dim, start, frames, *WAN_21.grid(height, width))).to(torch.complex64)
        self.rotation = rotation[None, :, None].to(self.workload.device)

    def forward(self, hidden_states):
        return self.rotation


class GrowingSelfAttention:
    """Keys and values are concatenated, attended to, and kept up to `limit` tokens. A diffusers attention processor.

    The passes after a chunk's first one overwrite: they concatenate with what is older than the chunk. So the first
    pass attends to up to `limit` tokens and the chunk, the others to `limit` tokens in all. What is kept is a view, as
    in the pull request, and so holds the whole concatenation in memory.
    """

    def __init__(self, limit: int | None):
        self.limit = limit  # None keeps everything
        self.kept: tuple[torch.Tensor, ...] = ()  # keys, values [B, S, H, D]
        self.overwriting = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Any = None):
        query = rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), rotary_emb)
        key = rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), rotary_emb)
        fresh = key, attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        tokens = key.shape[1]
        older = [kept[:, :-tokens] if self.overwriting else kept for kept in self.kept]
        grown = tuple(torch.cat([old, new], dim=1) for old, new in zip(older, fresh)) if older else fresh
        self.kept = tuple(tensor[:, -self.limit :] for tensor in grown) if self.limit else grown
        keys, values = grown
        heads = dispatch_attention_fn(query, keys, values, backend=None, parallel_config=None)
        return attn.to_out[1](attn.to_out[0](heads.flatten(2, 3)))

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.kept)
