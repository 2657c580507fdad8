"""What processes that share a video send and hold, counted from shapes alone; docs/scale.md shows the same in words."""

from __future__ import annotations

from typing import NamedTuple

from ..random_model import CHANNELS, BenchSize

CELLS = 4
"""Latent cells of a token: patches are 2x2."""


class Sent(NamedTuple):
    """Bytes that one process sends in a pass: exchanged around self-attention, and gathered of the flow at the end."""

    exchanged: int
    gathered: int

    @property
    def all(self) -> int:
        return self.exchanged + self.gathered


def tokens_of(height: int, width: int, frames: int) -> int:
    """Tokens of so many latent frames; height, width: pixels."""
    return frames * (height // 16) * (width // 16)


def sent(size: BenchSize, tokens: int, ranks: int, itemsize: int, *, keys_only: bool = False) -> Sent:
    """What a pass over a chunk of `tokens` tokens sends, from one of `ranks` processes.

    itemsize: bytes of a value. keys_only: a context pass, whose last block only writes its keys and values.
    """
    part = tokens * size.dim * itemsize * (ranks - 1) // ranks**2  # one of q, k, v and what comes of them, in one layer
    if keys_only:
        return Sent((4 * size.layers - 2) * part, 0)
    return Sent(4 * size.layers * part, tokens // ranks * CELLS * CHANNELS * itemsize * (ranks - 1))
