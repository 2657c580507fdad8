"""The rolling key/value cache: per layer one preallocated buffer, a sink and a ring, nothing shifted or concatenated.

Keys are stored after RoPE, and attention without a mask does not depend on the order of its keys. So a frame that
leaves the window is simply overwritten by the next one, and until the first frame leaves, the layout is plain append.
Every index is a host-side integer: no device synchronisation, static shapes once the window is full.

Window semantics are Self-Forcing's (https://arxiv.org/abs/2506.08009): the window counts the sink and the chunk being
made, and the oldest frames leave before the chunk attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .config import CacheConfig


class Segment(NamedTuple):
    """`count` consecutive frames of a chunk, from its frame `source` on, go to the slots from `slot` on."""

    source: int
    slot: int
    count: int


class FrameWindow:
    """Which latent frame lives in which slot. Integers only; frame indices are absolute, from the start of the video.

    A chunk is opened with `begin`, may be written any number of times (once per denoising step), and becomes part of
    the past with `commit`.
    """

    def __init__(self, capacity: int, sink: int = 0):
        self.capacity = capacity
        self.sink = sink
        self.end = 0  # frames committed so far = absolute index of the next frame
        self.open = 0  # frames of the chunk being made

    def begin(self, frames: int) -> None:
        """Open a chunk of `frames` latent frames; the oldest frames beyond the window are forgotten now.

        Raises ValueError when the window cannot hold the sink and the chunk.
        """
        if self.end + frames > self.capacity and self.sink + frames > self.capacity:
            raise ValueError(
                f"a chunk of {frames} latent frames does not fit a window of {self.capacity} with a sink of {self.sink}"
            )
        self.open = frames

    def commit(self) -> None:
        self.end += self.open
        self.open = 0

    @property
    def filled(self) -> int:
        """Slots in use, the open chunk included. Used slots are always the first ones."""
        return min(self.end + self.open, self.capacity)

    def slot(self, frame: int) -> int:
        if frame < self.sink:
            return frame
        return self.sink + (frame - self.sink) % (self.capacity - self.sink)

    def segments(self) -> list[Segment]:
        """Where the open chunk's frames go; more than one segment where the ring wraps around."""
        segments: list[Segment] = []
        for source in range(self.open):
            slot = self.slot(self.end + source)
            if segments and segments[-1].slot + segments[-1].count == slot:
                segments[-1] = segments[-1]._replace(count=segments[-1].count + 1)
            else:
                segments.append(Segment(source, slot, 1))
        return segments

    def frames(self) -> list[int]:
        """Absolute index of the frame in each used slot, the open chunk included."""
        end = self.end + self.open
        frames = list(range(min(end, self.sink)))
        frames += range(max(self.sink, end - (self.capacity - self.sink)), end)
        return sorted(frames, key=self.slot)


@dataclass(frozen=True)
class CacheShape:
    """Everything that decides how many bytes a cache takes. One latent frame is `tokens_per_frame` tokens."""

    layers: int
    batch: int
    tokens_per_frame: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, transformer, batch: int, latent_height: int, latent_width: int, dtype: torch.dtype) -> CacheShape:
        """The shape for a diffusers `WanTransformer3DModel` at a latent size."""
        config = transformer.config
        _, patch_height, patch_width = config.patch_size
        tokens = (latent_height // patch_height) * (latent_width // patch_width)
        return cls(config.num_layers, batch, tokens, config.num_attention_heads, config.attention_head_dim, dtype)

    @property
    def bytes_per_frame(self) -> int:
        """Bytes that the keys and values of one latent frame take over all layers and the whole batch."""
        values = self.layers * 2 * self.batch * self.tokens_per_frame * self.heads * self.head_dim
        return values * self.dtype.itemsize


class RollingKVCache:
    """Keys and values of the latent frames in the window, for one guidance branch.

    shape: sizes; `config`: window and sink in latent frames; `capacity`: frames to allocate when the window is
    unlimited (-1), where `reserve` can add more. With a window, capacity is the window.
    """

    def __init__(self, shape: CacheShape, config: CacheConfig, device: torch.device | str, capacity: int | None = None):
        if config.window != -1:
            capacity = config.window
        elif not capacity or capacity < 1:
            raise ValueError(f"an unlimited window needs a capacity of at least 1 latent frame, got {capacity}")
        self.shape = shape
        self.config = config
        self.device = torch.device(device)
        self.window = FrameWindow(capacity, config.sink)
        self._layers = [self._allocate(capacity) for _ in range(shape.layers)]

    @staticmethod
    def bytes_needed(shape: CacheShape, frames: int) -> int:
        """Bytes of a cache that holds `frames` latent frames, known before anything is allocated."""
        return shape.bytes_per_frame * frames

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(layer.nbytes for layer in self._layers)

    def _allocate(self, frames: int) -> torch.Tensor:
        shape = self.shape
        size = (2, shape.batch, frames * shape.tokens_per_frame, shape.heads, shape.head_dim)  # [K/V, B, S, H, D]
        return torch.zeros(size, dtype=shape.dtype, device=self.device)

    def reserve(self, frames: int) -> None:
        """Make room for a video of `frames` latent frames. Only an unlimited window ever grows."""
        if self.config.window != -1 or frames <= self.window.capacity:
            return
        # Nothing has ever left an unlimited window: slot equals frame, so a plain copy keeps the layout. One layer at
        # a time, so that old and new buffers of only one layer coexist.
        used = self.window.filled * self.shape.tokens_per_frame
        for index, old in enumerate(self._layers):
            new = self._allocate(frames)
            new[:, :, :used] = old[:, :, :used]
            self._layers[index] = new
        self.window.capacity = frames

    def reset(self) -> None:
        """Forget every frame; the buffers stay allocated."""
        self.window = FrameWindow(self.window.capacity, self.window.sink)

    def begin(self, frames: int) -> None:
        """Open a chunk of `frames` latent frames. See `FrameWindow.begin`; an unlimited window grows if it must."""
        self.reserve(self.window.end + frames)
        self.window.begin(frames)
        tokens = self.shape.tokens_per_frame
        self._writes = [tuple(tokens * n for n in segment) for segment in self.window.segments()]
        self._used = self.window.filled * tokens

    def commit(self) -> None:
        """The open chunk, as last written, becomes part of the past."""
        self.window.commit()

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the open chunk's keys and values of one layer, and return everything it attends to.

        key, value: [B, S, H, D] with S tokens of the open chunk, the key after RoPE. Returns views of the buffer,
        [B, used tokens, H, D], valid until the next update.
        """
        buffer = self._layers[layer]
        for source, slot, count in self._writes:
            buffer[0, :, slot : slot + count] = key[:, source : source + count]
            buffer[1, :, slot : slot + count] = value[:, source : source + count]
        return buffer[0, :, : self._used], buffer[1, :, : self._used]


class PromptCache:
    """What depends on the prompt alone: its projection and each layer's cross-attention keys and values.

    embeds: [B, L, text dim], zero-padded. Filled by the first pass, constant afterwards.
    """

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds
        self.projected: torch.Tensor | None = None  # [B, L, dim]
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [B, L, H, D] each

    @staticmethod
    def bytes_needed(shape: CacheShape, tokens: int) -> int:
        """Bytes of the filled cache for a prompt of `tokens` tokens, padding included."""
        return (2 * shape.layers + 1) * shape.batch * tokens * shape.heads * shape.head_dim * shape.dtype.itemsize


@dataclass
class Branch:
    """One guidance branch: its rolling cache and its prompt. The conditional and unconditional ones never mix."""

    cache: RollingKVCache
    prompt: PromptCache
