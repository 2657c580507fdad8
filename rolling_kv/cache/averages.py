"""What becomes of frames that leave the window, where they are not simply forgotten: averages that stay in view.

Both keep one average per layer, in float32 or in the model's dtype. In bfloat16, in which the originals keep theirs,
most of a small share is lost to rounding: the average hardly moves.
"""

from __future__ import annotations

import torch

from ..config import CacheConfig
from .sizes import CacheShape

Average = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer."""


class SinkAverage:
    """The sink as a moving average of what leaves: new = alpha * old + (1 - alpha) * leaving, keys and values alike.

    Keys stand at the places in time of the sink's own frames, so that what is averaged differs in content only.
    Source: Reward-Forcing (https://arxiv.org/abs/2512.04678), where a chunk is folded into a sink of its size.
    """

    def __init__(self, shape: CacheShape, config: CacheConfig):
        self.alpha = config.ema_alpha
        self.dtype = torch.float32 if config.accumulate == "float32" else shape.dtype
        self.layers: dict[int, Average] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for average in self.layers.values() for tensor in average)

    def start(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin with the sink's own keys and values, [B, S, H, D]."""
        self.layers[layer] = (keys.to(self.dtype, copy=True), values.to(self.dtype, copy=True))

    def fold(self, layer: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fold what leaves, [B, S, H, D], into the sink's tokens from `first` on."""
        for average, leaving in zip(self.layers[layer], (keys, values)):
            place = average[:, first : first + leaving.shape[1]]
            # Two products and a sum, each rounded to the average's dtype, as in the original.
            place.copy_(self.alpha * place + (1 - self.alpha) * leaving.to(self.dtype))

    @staticmethod
    def bytes_needed(shape: CacheShape, config: CacheConfig) -> int:
        """Bytes of the averages of all layers."""
        item = 4 if config.accumulate == "float32" else shape.dtype.itemsize
        tokens = shape.layers * shape.batch * config.sink * shape.tokens_per_frame
        return 2 * tokens * shape.heads * shape.head_dim * item


class MemoryAverages:
    """Two moving averages of what leaves, a slow and a fast one: one vector per head, the mean over all leaving tokens.

    Keys are averaged before RoPE, for they come from many places. Source: MemRoPE (https://arxiv.org/abs/2603.12513).
    """

    def __init__(self, shape: CacheShape, config: CacheConfig):
        self.alphas = config.memory_alphas
        self.dtype = torch.float32 if config.accumulate == "float32" else shape.dtype
        self.layers: dict[int, tuple[Average, Average]] = {}  # slow and fast, [B, 1, H, D] each

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for memory in self.layers.values() for average in memory for tensor in average)

    def fold(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fold what leaves, [B, S, H, D], the keys before RoPE."""
        fresh = self._mean(keys), self._mean(values)
        if layer not in self.layers:
            self.layers[layer] = (fresh, fresh)
            return
        slow, fast = (
            (alpha * fresh[0] + (1 - alpha) * old[0], alpha * fresh[1] + (1 - alpha) * old[1])
            for alpha, old in zip(self.alphas, self.layers[layer])
        )
        self.layers[layer] = (slow, fast)

    def _mean(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.float().mean(1, keepdim=True).to(self.dtype)

    @staticmethod
    def bytes_needed(shape: CacheShape, config: CacheConfig) -> int:
        """Bytes of both averages of all layers."""
        item = 4 if config.accumulate == "float32" else shape.dtype.itemsize
        return 4 * shape.layers * shape.batch * shape.heads * shape.head_dim * item
