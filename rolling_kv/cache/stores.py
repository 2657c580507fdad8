"""Where a cache keeps its bytes: buffers on the compute device."""

from __future__ import annotations

import torch

from .codecs import Parts

Sizes = list[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each part of a layer, [2 (keys, values), B, S, H, ·]."""


class Resident:
    """Every layer's parts on one device.

    layers: number of transformer layers.
    sizes: shape and dtype of each part of a layer.
    device: where the parts are allocated, filled with zeros.
    """

    def __init__(self, layers: int, sizes: Sizes, device: torch.device):
        self.device = device
        self.layers = [self._allocate(sizes) for _ in range(layers)]

    def _allocate(self, sizes: Sizes) -> Parts:
        return tuple(torch.zeros(size, dtype=dtype, device=self.device) for size, dtype in sizes)

    @property
    def device_bytes(self) -> int:
        """Bytes on the compute device."""
        return nbytes_of(self.layers)

    @property
    def host_bytes(self) -> int:
        """Bytes in CPU memory beside those."""
        return 0

    def resize(self, sizes: Sizes, used: int) -> None:
        """Move to parts of other sizes. Old and new coexist for one layer at a time.

        sizes: of the new parts.
        used: tokens to keep, from the first one on.
        """
        for index, old in enumerate(self.layers):
            new = self._allocate(sizes)
            for source, target in zip(old, new):
                target[:, :, :used] = source[:, :, :used]
            self.layers[index] = new

    def open(self, layer: int, tokens: int) -> Parts:
        """The parts of a layer, of which the first `tokens` tokens are going to be read; writable until `close`."""
        return self.layers[layer]

    def close(self, layer: int, written: list[tuple[int, int]]) -> None:
        """What was written in the opened parts: (first token, count) each."""

    def copied(self, parts: Parts) -> Parts:
        """A copy of parts of a layer, for as long as the caller wants it, where this store keeps its own."""
        return tuple(part.to(self.device, copy=True) for part in parts)

    def finish(self) -> None:
        """Return when the CPU can read and write what the layers hold."""

    def discard(self) -> None:
        """Forget what is on its way: the next pass starts at the first layer again."""

    def release(self) -> None:
        """Let go of the parts."""
        self.layers.clear()


def nbytes_of(layers: list[Parts]) -> int:
    """Bytes of all parts of some layers."""
    return sum(part.nbytes for parts in layers for part in parts)
