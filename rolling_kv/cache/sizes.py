"""Shapes and bytes of a cache, known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..geometry import Geometry
from .codecs import CODECS


@dataclass(frozen=True)
class CacheShape:
    """Everything that decides how many bytes a cache takes.

    layers: transformer blocks.
    batch: videos side by side.
    tokens_per_frame: tokens of one latent frame.
    heads, head_dim: of the attention; where processes share the heads, those of one of them.
    dtype: that the model computes in.
    grid: tokens along height and width of one latent frame; needed where frames are averaged over their tokens.
    """

    layers: int
    batch: int
    tokens_per_frame: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    grid: tuple[int, int] = (1, 1)

    @classmethod
    def of(
        cls, transformer, batch: int, latent_height: int, latent_width: int, dtype: torch.dtype, ranks: int = 1
    ) -> CacheShape:
        """The shape for a diffusers `WanTransformer3DModel` at a latent size. ranks: processes that share the heads."""
        config = transformer.config
        geometry = Geometry.of(transformer)
        tokens, grid = (
            geometry.tokens_per_frame(latent_height, latent_width),
            geometry.grid(latent_height, latent_width),
        )
        heads = config.num_attention_heads // ranks
        return cls(config.num_layers, batch, tokens, heads, config.attention_head_dim, dtype, grid)

    def bytes_per_frame(self, storage: str = "model") -> int:
        """Bytes that the keys and values of one latent frame take over all layers and the whole batch."""
        heads = self.layers * 2 * self.batch * self.tokens_per_frame * self.heads
        return heads * CODECS[storage](self.dtype).bytes_per_head(self.head_dim)


class CacheBytes(NamedTuple):
    """Bytes by where they lie.

    device: where the model computes.
    host: in CPU memory, beside it.
    """

    device: int
    host: int
