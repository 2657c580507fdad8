"""What a rolling cache holds at one point of a video, put aside in CPU memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .codecs import Parts
from .window import FrameWindow


class KeptFrames(NamedTuple):
    """Keys and values of the frames in a window, and what is known of them. Nobody changes it.

    layers: of each layer, the parts of the slots that are in use, [2 (keys, values), B, S, H, ·].
    originals: per layer, the kept frames' keys as first written. averages: per layer, of what has left.
    window: which frames these are. places: further facts of the cache, by name.
    """

    layers: tuple[Parts, ...]
    originals: dict[int, Parts]
    averages: dict[int, Any]
    window: FrameWindow
    places: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes in CPU memory."""
        total = 0

        def count(tensor: torch.Tensor) -> None:
            nonlocal total
            total += tensor.nbytes

        each_tensor((self.layers, self.originals, self.averages), count)
        return total


def each_tensor(nested: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same tuples and dicts with what `change` makes of their tensors."""
    if isinstance(nested, torch.Tensor):
        return change(nested)
    if isinstance(nested, dict):
        return {key: each_tensor(value, change) for key, value in nested.items()}
    return tuple(each_tensor(value, change) for value in nested)
