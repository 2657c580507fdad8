"""The floor: the matrix products and attention calls of a chunk, and nothing else."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ...geometry import TEXT_LENGTH
from ...platforms import attending_with, attention_kernels, platform_of
from ..random_model import HEAD_DIM
from .contenders import Contender


class Floor(Contender):
    """(e) Every Linear of the blocks with its own weights, and SDPA over as many keys as the engine has at that chunk.

    As the engine: a context pass of the chunk before, whose last block needs only keys and values, then the steps; attention
    tries the same kernels in the same order. The inputs are the same few tensors over and over, which is at least as fast as
    fresh ones.
    """

    letter = "e"
    title = "floor: bare linears and SDPA"
    note = "the same shapes as (a): nothing between the products, no copy into a cache"

    def __init__(self, workload, weights):
        super().__init__(workload, weights)
        size, device, dtype = workload.size, workload.device, workload.dtype
        tokens = workload.chunk_shape[2] * workload.tokens_per_frame
        keys = workload.frames_used(workload.chunks - 1) * workload.tokens_per_frame

        def random(*shape):
            return torch.randn(shape, dtype=dtype, device=device)

        self.hidden = random(1, tokens, size.dim)
        self.inner = random(1, tokens, size.ffn)
        self.query = random(1, tokens, size.heads, HEAD_DIM)
        self.cached = random(2, 1, keys, size.heads, HEAD_DIM)
        self.prompt = random(2, 1, TEXT_LENGTH, size.heads, HEAD_DIM)
        self.kernels = attention_kernels(platform_of(device), dtype)
        self.blocks = [_block_linears(weights, f"blocks.{index}.") for index in range(size.layers)]

    def chunk(self, index):
        workload = self.workload
        with torch.inference_mode(), attending_with(self.kernels):
            if index:
                self._pass(workload.frames_used(index - 1), keys_only=True)
            for _ in workload.steps:
                self._pass(workload.frames_used(index))

    @classmethod
    def follow_memory(cls, workload, weights):
        return []  # it makes no video

    def _pass(self, frames: int, keys_only: bool = False) -> None:
        used = frames * self.workload.tokens_per_frame
        for linears in self.blocks[:-1] if keys_only else self.blocks:
            for name, (weight, bias) in linears.items():
                linear(self.inner if name == "ffn.2" else self.hidden, weight, bias)
            self._attend(self.cached[:, :, :used])
            self._attend(self.prompt)
        if keys_only:
            for name in ("self_attn.k", "self_attn.v"):
                linear(self.hidden, *self.blocks[-1][name])

    def _attend(self, cached: torch.Tensor) -> None:
        # [B, S, H, D] in memory, [B, H, S, D] by strides, as the engine hands them over.
        query, key, value = (heads.transpose(1, 2) for heads in (self.query, *cached))
        scaled_dot_product_attention(query, key, value)


def _block_linears(weights: dict, prefix: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The Linear layers that a pass runs; the prompt's keys and values are computed once per video."""
    names = [f"self_attn.{name}" for name in "qkvo"] + ["cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"]
    return {name: (weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]) for name in names}
