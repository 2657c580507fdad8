"""What depends on the prompt alone, and the guidance branch that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rolling import RollingKVCache
from .sizes import CacheShape


class PromptCache:
    """What depends on the prompt alone: its projection and each layer's cross-attention keys and values.

    embeds: [B, L, text dim], zero-padded. Filled by the first pass, constant afterwards.
    """

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds
        self.projected: torch.Tensor | None = None  # [B, L, dim]
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [B, L, H, D] each

    @property
    def nbytes(self) -> int:
        """Bytes of all but the embeddings, now."""
        filled = [tensor for pair in self.layers.values() for tensor in pair]
        return sum(tensor.nbytes for tensor in filled + ([] if self.projected is None else [self.projected]))

    def release(self) -> None:
        """Give the memory back now, whoever still refers to this cache; it can be filled again."""
        self.projected = None
        self.layers = {}  # a new one: recorded passes go on with the memory of the earlier one

    @staticmethod
    def bytes_needed(shape: CacheShape, tokens: int) -> int:
        """Bytes of the filled cache for a prompt of `tokens` tokens, padding included."""
        return (2 * shape.layers + 1) * shape.batch * tokens * shape.heads * shape.head_dim * shape.dtype.itemsize


@dataclass
class Branch:
    """One guidance branch: its rolling cache and its prompt. The conditional and unconditional ones never mix."""

    cache: RollingKVCache
    prompt: PromptCache
