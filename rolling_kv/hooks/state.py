"""The state behind the hook API (`rolling_kv.hooks`): per cache context, a cache for each layer and how to write to it.

Units are tokens throughout: each layer has a `RollingKVCache` of its own in which a "latent frame" is one token. So
modules with any number of heads, on any device, can be mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, StateManager

from ..cache.rolling import RollingKVCache
from ..cache.sizes import CacheShape
from ..config import ALL_FRAMES, CacheConfig

WRITE_MODES = ("append", "overwrite")
DEFAULT_CONTEXT = "inference"


@dataclass(frozen=True)
class RollingKVCacheConfig:
    """What the cache of each attention module keeps.

    window_size: tokens that a pass attends to, counting the sink and its own tokens; -1 keeps every token.
    sink_size: the first tokens, which never leave the window.
    """

    window_size: int = -1
    sink_size: int = 0

    def __post_init__(self):
        if self.window_size != -1 and self.window_size < 1:
            raise ValueError(f"window_size must be -1 (keep every token) or at least 1 token, got {self.window_size}")
        if self.sink_size < 0:
            raise ValueError(f"sink_size must not be negative, got {self.sink_size}")
        if -1 < self.window_size <= self.sink_size:
            raise ValueError(
                f"a window of {self.window_size} tokens has no room beside a sink of {self.sink_size}: "
                f"make window_size at least {self.sink_size + 1}, or sink_size smaller"
            )


class RollingKVCacheState(BaseState):
    """What one cache context ("cond", "uncond", …) holds, and how its next passes write.

    should_update_cache: when False, a pass attends to the cache and to its own tokens, and leaves the cache as it was.
    write_mode, absolute_token_offset: set by `configure_cache_write`.
    """

    def __init__(self, config: RollingKVCacheConfig | None = None):
        self.config = config or RollingKVCacheConfig()
        self._layers: dict[str, RollingKVCache] = {}  # by name of the attention module; one token is one "frame"
        self.reset()

    def configure_cache_write(self, write_mode: str = "append", absolute_token_offset: int | None = None) -> None:
        """Say where the passes from now on write.

        "append": behind the last token. "overwrite": from token `absolute_token_offset` on, counted from the last
        reset; what the cache holds from there on is forgotten. So the first denoising step of a chunk appends it, and
        the steps after it overwrite it. Raises ValueError for another mode, and unless the offset comes with
        "overwrite" and only with it; whether it lies within the cache is checked by the pass.
        """
        if write_mode not in WRITE_MODES:
            raise ValueError(f"write_mode must be one of {', '.join(WRITE_MODES)}, got {write_mode!r}")
        if write_mode == "append" and absolute_token_offset is not None:
            raise ValueError(
                f"an append goes behind the last token and takes no absolute_token_offset, got "
                f'{absolute_token_offset}; to write there, use write_mode "overwrite"'
            )
        if write_mode == "overwrite" and (absolute_token_offset is None or absolute_token_offset < 0):
            raise ValueError(f"an overwrite needs an absolute_token_offset of at least 0, got {absolute_token_offset}")
        self.write_mode = write_mode
        self.absolute_token_offset = absolute_token_offset

    def clear_cache_write(self) -> None:
        """Append again."""
        self.configure_cache_write("append")

    def reset(self) -> None:
        """Forget every token, free the buffers, and go back to appending."""
        self._layers.clear()
        self._unfinished = False  # a pass has written to some layers and not yet to all
        self.should_update_cache = True
        self.clear_cache_write()

    @property
    def next_token_offset(self) -> int:
        """Tokens written since the last reset, also those that have left the window: where an append goes."""
        return max((cache.window.end for cache in self._layers.values()), default=0)

    @property
    def write_offset(self) -> int:
        """Absolute position of the first token of the next pass."""
        return self._start_after(self.next_token_offset)

    def _start_after(self, end: int) -> int:
        """First token of the next pass over a layer that ends at token `end`."""
        return end if self.absolute_token_offset is None else self.absolute_token_offset

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers of all layers."""
        return sum(cache.nbytes.device for cache in self._layers.values())

    def begin_pass(self) -> None:
        if self._unfinished:
            raise ValueError(
                "the last pass was interrupted when some layers had written their keys and others had not, so they "
                "no longer agree: call reset() on this state and run the passes of the video again"
            )

    def end_pass(self) -> None:
        self._unfinished = False

    @contextmanager
    def attended(
        self, layer: str, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Write a layer's part of a pass; gives all keys and values that it attends to, valid inside the context.

        key, value: [B, S, H, D], the key after RoPE; what is given is [B, tokens in the window, H, D]. Raises
        ValueError, and changes nothing, when the pass does not fit what is cached.
        """
        cache = self._layers.get(layer)
        if cache is not None and not cache.window.end:  # nothing was kept: it may have another batch size now
            cache = None
        start = self._checked_start(cache, *value.shape[:2])
        end = start + value.shape[1]
        # Buffers are ordinary tensors, also when this pass runs in inference mode and the next one does not.
        with torch.inference_mode(False):
            if cache is None:
                cache = self._layers[layer] = self._allocate(value)
            cache.grow(end)
        if self.should_update_cache:
            self._unfinished = True
            cache.window.end = start
            cache.begin(end - start)
            written = cache.update(0, key.detach(), value.detach())
            cache.commit()
            yield written
        else:
            with _borrowed(cache, start, key.detach(), value.detach()) as written:
                yield written

    def _allocate(self, value: torch.Tensor) -> RollingKVCache:
        batch, tokens, heads, head_dim = value.shape
        shape = CacheShape(layers=1, batch=batch, tokens_per_frame=1, heads=heads, head_dim=head_dim, dtype=value.dtype)
        window = ALL_FRAMES if self.config.window_size == -1 else self.config.window_size
        config = CacheConfig(window=window, sink=self.config.sink_size)
        return RollingKVCache(shape, config, value.device, capacity=tokens)

    def _checked_start(self, cache: RollingKVCache | None, batch: int, tokens: int) -> int:
        """First token that a pass of `tokens` tokens writes to a layer; ValueError if it must not."""
        if cache is not None and cache.shape.batch != batch:
            raise ValueError(
                f"the cache holds a batch of {cache.shape.batch}, this pass has a batch of {batch}: give each guidance "
                'branch a cache_context of its own ("cond", "uncond"), or call reset() before another batch size'
            )
        window, sink = self.config.window_size, self.config.sink_size
        end = cache.window.end if cache is not None else 0
        start = self._start_after(end)
        evicting = window != -1 and end > window
        oldest = end - (window - sink) if evicting else 0
        if start > end:
            raise ValueError(
                f"cannot overwrite at token {start}: the cache ends at token {end}; append what is missing in between"
            )
        if start < oldest:
            raise ValueError(
                f"cannot overwrite at token {start}: it has left the window, which holds tokens {oldest} to {end}"
                + (f" and the sink of {sink}" if sink else "")
            )
        if evicting and start + tokens < end:
            raise ValueError(
                f"cannot overwrite tokens {start} to {start + tokens} of {end}: the window would reach back to tokens "
                f"before {oldest}, which are gone; overwrite at token {end - tokens} or reset()"
            )
        if window != -1 and start + tokens > window and sink + tokens > window:
            raise ValueError(
                f"a pass of {tokens} tokens does not fit a window of {window} with a sink of {sink}: "
                f"make window_size at least {sink + tokens}"
            )
        return start


@contextmanager
def _borrowed(cache: RollingKVCache, start: int, key: torch.Tensor, value: torch.Tensor):
    """Write as a kept pass would, so that the same keys are attended in the same order; put back what was there."""
    end, oldest = cache.window.end, cache.window.oldest
    saved = []
    try:
        cache.window.end = start
        cache.begin(key.shape[1])
        for part in cache.store.open(0, cache.window.filled):
            for _, slot, count in cache.window.segments():
                place = part[:, :, slot : slot + count]
                saved.append((place, place.clone()))
        yield cache.update(0, key, value)
    finally:
        for place, before in saved:
            place.copy_(before)
        cache.window.end, cache.window.oldest, cache.window.open = end, oldest, 0


class ContextStates(StateManager):
    """One state per cache context, and one for passes outside any `cache_context`.

    diffusers hands over the context as its name or, in later releases, as an object that has one. Unlike the base
    class, a reset keeps the state objects: what `get_rolling_kv_cache_state` returned stays the one in use.
    """

    def __init__(self, config: RollingKVCacheConfig):
        super().__init__(RollingKVCacheState, (config,))  # pyright: ignore[reportArgumentType]: it takes the class
        self.config = config
        self.states: dict[str, RollingKVCacheState] = {}
        self.set_context(None)

    def set_context(self, context: Any) -> None:
        self.active: str = getattr(context, "name", context) or DEFAULT_CONTEXT

    def get_state(self) -> RollingKVCacheState:
        if self.active not in self.states:
            self.states[self.active] = RollingKVCacheState(self.config)
        return self.states[self.active]

    def reset(self) -> None:
        for state in self.states.values():
            state.reset()
