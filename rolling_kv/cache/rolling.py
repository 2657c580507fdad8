"""The rolling key/value cache: per layer one preallocated buffer, a sink and a ring, nothing shifted or concatenated.

Keys are stored after RoPE, and attention without a mask does not depend on the order of its keys. So a frame that
leaves the window is simply overwritten by the next one, and until the first frame leaves, the layout is plain append.
Every index is a host-side integer: no device synchronisation, static shapes once the window is full.

Window semantics are Self-Forcing's (https://arxiv.org/abs/2506.08009): the window counts the sink and the chunk being
made, and the oldest frames leave before the chunk attends.
"""

from __future__ import annotations

import torch

from ..config import CacheConfig
from ..devices import to_device
from ..rope import rotate, rotations, time_shift_angles
from .codecs import CODECS, Parts
from .offload import Offloaded
from .sizes import CacheBytes, CacheShape
from .stores import Resident, Sizes
from .window import FrameWindow


class RollingKVCache:
    """Keys and values of the latent frames in the window, for one guidance branch.

    shape: everything that decides the bytes of one latent frame.
    config: window and sink in latent frames, and how bytes are kept.
    device: where the model computes.
    capacity: latent frames to allocate where the window is unlimited; `reserve` adds more at once, `begin` adds by halves
        of what there is. With a window, the capacity is the window.

    Raises ValueError for an unlimited window without a capacity.
    """

    def __init__(self, shape: CacheShape, config: CacheConfig, device: torch.device | str, capacity: int | None = None):
        if config.limit is not None:
            capacity = config.limit
        elif not capacity or capacity < 1:
            raise ValueError(f"an unlimited window needs a capacity of at least 1 latent frame, got {capacity}")
        self.shape = shape
        self.config = config
        self.device = torch.device(device)
        self.window = FrameWindow(capacity, config.sink)
        self.codec = CODECS[config.storage](shape.dtype)
        self.store = (Offloaded if config.offload else Resident)(shape.layers, self._sizes(capacity), self.device)
        self._sink_keys: dict[int, Parts] = {}  # per layer, as first written: only with window positions
        self._sink_shifts = [0] * shape.layers  # latent frames by which each layer's sink keys have been moved
        self._sink_turn: torch.Tensor | None = None  # the open chunk's rotation of every layer's sink keys

    @staticmethod
    def bytes_needed(shape: CacheShape, config: CacheConfig, frames: int) -> CacheBytes:
        """Bytes that a cache of `frames` latent frames takes at its peak: what it keeps, and one layer unpacked."""
        kept = RollingKVCache.bytes_kept(shape, config, frames)
        heads = 2 * shape.batch * frames * shape.tokens_per_frame * shape.heads  # keys and values
        unpacked = heads * CODECS[config.storage](shape.dtype).unpack_bytes(shape.head_dim)
        return CacheBytes(kept.device + unpacked, kept.host)

    @staticmethod
    def bytes_kept(shape: CacheShape, config: CacheConfig, frames: int) -> CacheBytes:
        """Bytes of a cache that holds `frames` latent frames, known before anything is allocated."""
        total = shape.bytes_per_frame(config.storage) * frames
        sink_keys = shape.bytes_per_frame(config.storage) * config.sink // 2 if config.positions == "window" else 0
        if config.offload:
            return CacheBytes(total // shape.layers * 2, total + sink_keys)
        return CacheBytes(total + sink_keys, 0)

    @property
    def nbytes(self) -> CacheBytes:
        """Bytes held now."""
        sink_keys = sum(part.nbytes for parts in self._sink_keys.values() for part in parts)
        if self.config.offload:
            return CacheBytes(self.store.device_bytes, self.store.host_bytes + sink_keys)
        return CacheBytes(self.store.device_bytes + sink_keys, self.store.host_bytes)

    def _sizes(self, frames: int) -> Sizes:
        shape = self.shape
        size = (2, shape.batch, frames * shape.tokens_per_frame, shape.heads)  # [K/V, B, S, H]
        return [((*size, width), dtype) for width, dtype in self.codec.widths(shape.head_dim)]

    def reserve(self, frames: int) -> None:
        """Make room for a video of `frames` latent frames. Only an unlimited window ever grows."""
        if self.config.unlimited and frames > self.window.capacity:
            # Nothing has ever left an unlimited window: slot equals frame, so the layout stays.
            self.store.resize(self._sizes(frames), self.window.filled * self.shape.tokens_per_frame)
            self.window.capacity = frames

    def grow(self, frames: int) -> None:
        """Make room for `frames` latent frames, and for some that follow: appends cost little more than their own size."""
        if frames <= self.window.capacity:
            return
        try:
            self.reserve(max(frames, self.window.capacity * 3 // 2))
        except ValueError:  # there is too little RAM for those that follow
            self.reserve(frames)

    def reset(self) -> None:
        """Forget every frame; the buffers stay allocated."""
        self.window = FrameWindow(self.window.capacity, self.window.sink)
        self._sink_keys.clear()
        self._sink_shifts = [0] * self.shape.layers
        self.store.discard()

    def release(self) -> None:
        """Give the memory back now, whoever still refers to this cache, which is of no use any more."""
        self.store.release()
        self._sink_keys.clear()

    def begin(self, frames: int) -> None:
        """Open a chunk of `frames` latent frames. See `FrameWindow.begin`; an unlimited window grows if it must."""
        self.grow(self.window.end + frames)
        self.window.begin(frames)
        self._sink_turn = None
        tokens = self.shape.tokens_per_frame
        self._writes = [tuple(tokens * n for n in segment) for segment in self.window.segments()]
        self._used = self.window.filled * tokens

    @property
    def layout(self) -> tuple | None:
        """Where a pass over the open chunk writes, and how far it reads: all that the CPU decides about it.

        None where no later chunk will find the same: the window is not full yet, a sink with window positions moves with every chunk,
        or offloaded layers come and go.
        """
        config = self.config
        repeats = self.window.filled == config.limit and config.positions == "absolute" and not config.offload
        return (self._used, *self._writes) if repeats else None

    def commit(self) -> None:
        """The open chunk, as last written, becomes part of the past."""
        self.window.commit()

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the open chunk's keys and values of one layer, and return everything it attends to.

        layer: index of the transformer block.
        key, value: [B, S, H, D] with S tokens of the open chunk, the key after RoPE.

        Returns keys and values, [B, used tokens, H, D] each, valid until the next update: views of the buffer, or copies
        where the storage has another dtype.
        """
        parts = self.write(layer, key, value)
        keys, values = (tuple(part[kind, :, : self._used] for part in parts) for kind in (0, 1))
        return self.codec.unpack(keys), self.codec.unpack(values)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Parts:
        """The writing half of `update`; returns the layer's stored parts."""
        parts = self.store.open(layer, self._used)
        written = [(slot, count) for _, slot, count in self._writes]
        if self.config.positions == "window" and self._rebase_sink(layer, parts):
            written.append((0, self.config.sink * self.shape.tokens_per_frame))
        for kind, packed in enumerate((self.codec.pack(key), self.codec.pack(value))):
            for part, fresh in zip(parts, packed):
                for source, slot, count in self._writes:
                    part[kind, :, slot : slot + count] = fresh[:, source : source + count]
        self.store.close(layer, written)
        return parts

    def _rebase_sink(self, layer: int, parts: Parts) -> bool:
        """Move the sink's keys in time to just before the rest of the window; tells whether they had to be."""
        shift = max(0, self.window.end + self.window.open - self.window.capacity)
        if shift == self._sink_shifts[layer]:
            return False
        tokens = self.config.sink * self.shape.tokens_per_frame
        if layer not in self._sink_keys:
            # Turned from the keys as they were written, every time: rounding does not add up.
            self._sink_keys[layer] = self.store.copied(tuple(part[0, :, :tokens] for part in parts))
        keys = self.codec.unpack(tuple(part.to(self.device, non_blocking=True) for part in self._sink_keys[layer]))
        if self._sink_turn is None:
            turn = rotations(time_shift_angles(self.shape.head_dim, shift)).to(torch.complex64)
            self._sink_turn = to_device(turn, self.device)
        for part, packed in zip(parts, self.codec.pack(rotate(keys, self._sink_turn))):
            part[0, :, :tokens] = packed
        self._sink_shifts[layer] = shift
        return True
