"""Self-attention with a cache that is a new tensor on every pass, for comparison."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ..rope import rotate
from .memory import storage_bytes


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

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query = rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), rotary_emb)
        key = rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), rotary_emb)
        fresh = key, attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        tokens = key.shape[1]
        older = [kept[:, :-tokens] if self.overwriting else kept for kept in self.kept]
        grown = tuple(torch.cat([old, new], dim=1) for old, new in zip(older, fresh)) if older else fresh
        self.kept = tuple(tensor[:, -self.limit :] for tensor in grown) if self.limit else grown
        heads = dispatch_attention_fn(query, *grown, backend=None, parallel_config=None)
        return attn.to_out[1](attn.to_out[0](heads.flatten(2, 3)))

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.kept)
