"""What the passes of Rolling-Forcing see (https://github.com/TencentARC/RollingForcing): an anchor, and the last frames.

A *clean pass* writes a finished chunk, and sees the frames up to it that lie within the reach, where they are. A *joint
pass* holds the chunks that are still noisy. It sees the first frames of the video, the anchor, moved in time to just before
the last clean frames, then these, then its own in both directions; it writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..config import CacheConfig
from ..devices import to_device
from ..rope import rotate, rotations, time_shift_angles
from .codecs import Parts
from .rolling import RollingKVCache, Turning
from .sizes import CacheBytes, CacheShape


class JointKVCache(RollingKVCache):
    """Keeps the anchor, which is the sink, and beside it as many frames as a pass can reach, which is the window.

    shape, device, capacity: as for `RollingKVCache`.
    config: the sink counts within the window of a joint pass. A clean pass sees it only as far as it lies in the window.
    """

    def __init__(self, shape: CacheShape, config: CacheConfig, device: torch.device | str, capacity: int | None = None):
        super().__init__(shape, _kept(config), device, capacity)
        self.reach = config.limit or 0

    @staticmethod
    def bytes_kept(shape: CacheShape, config: CacheConfig, frames: int) -> CacheBytes:
        """Bytes of a cache with these settings, however many `frames` there are."""
        return RollingKVCache.bytes_kept(shape, _kept(config), _kept(config).limit or frames)

    @staticmethod
    def bytes_needed(shape: CacheShape, config: CacheConfig, frames: int) -> CacheBytes:
        """As `RollingKVCache.bytes_needed`, what joint passes gather not counted."""
        return RollingKVCache.bytes_needed(shape, _kept(config), _kept(config).limit or frames)

    @staticmethod
    def bytes_gathered(shape: CacheShape, config: CacheConfig, frames: int) -> int:
        """Bytes of what a joint pass over `frames` latent frames attends to, in one layer at a time: a copy."""
        seen = max(config.limit or 0, config.sink + frames)
        return 2 * shape.batch * seen * shape.tokens_per_frame * shape.heads * shape.head_dim * shape.dtype.itemsize

    def update(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        turning: Turning | None = None,
        slots: torch.Tensor | None = None,
        as_kept: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts, window = self.write(layer, key, value, turning, slots), self.window
        first = min(max(0, window.end + window.open - self.reach), self.config.sink) * self.shape.tokens_per_frame
        return self._read(parts, slice(first, self._used), turning, as_kept)


class Ahead(NamedTuple):
    """The frames of a joint pass, as `FrameWindow` has them: `open` frames from the absolute frame `end` on."""

    end: int
    open: int


class JointPass:
    """What one joint pass attends to, in the place of a cache that it would write.

    cache: where the clean frames are; no chunk is open in it.
    frames: latent frames of the pass.
    """

    repeats = False
    """The anchor moves with every pass: none is recorded."""

    @staticmethod
    def value_rows(layer: int) -> None:
        """Nothing is written."""

    def __init__(self, cache: JointKVCache, frames: int):
        self.cache = cache
        self.shape = cache.shape
        start = cache.window.end
        self.window = Ahead(start, frames)
        self.position = start
        self.anchor = min(cache.config.sink, start)
        self.working = range(start - max(0, min(cache.reach - self.anchor - frames, start - self.anchor)), start)
        turn = rotations(time_shift_angles(self.shape.head_dim, self.working.start - self.anchor))
        self.turn = to_device(turn.to(torch.complex64), cache.device)

    def update(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        turning: Turning | None = None,
        slots: torch.Tensor | None = None,
        as_kept: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the pass attends to, [B, S', H, D] each; see `RollingKVCache.update`.

        slots: of the open chunk, which is not written here. as_kept: what is gathered is a copy in the model's dtype.
        """
        if turning is not None:
            key = turning.turned(key)
        cache, dtype = self.cache, self.shape.dtype
        held = [(0, self.anchor), *_runs([cache.window.slot(frame) for frame in self.working])]
        parts = cache.store.open(layer, cache.window.filled * self.shape.tokens_per_frame)
        keys, values = ([self._read(parts, kind, *run) for run in held] for kind in (0, 1))
        keys[0] = rotate(keys[0], self.turn)
        gathered = torch.cat([*keys, key.to(dtype)], dim=1), torch.cat([*values, value.to(dtype)], dim=1)
        cache.store.close(layer, [])
        return gathered

    def _read(self, parts: Parts, kind: int, slot: int, frames: int) -> torch.Tensor:
        tokens = self.shape.tokens_per_frame
        return self.cache.codec.unpack(tuple(part[kind, :, slot * tokens : (slot + frames) * tokens] for part in parts))


def _kept(config: CacheConfig) -> CacheConfig:
    """The settings of the cache that holds the anchor beside all that a clean pass sees."""
    return config if config.limit is None else replace(config, window=config.limit + config.sink)


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Slots in their order, as (first slot, count) of those that follow each other."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and slot == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((slot, 1))
    return runs
