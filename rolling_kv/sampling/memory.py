"""What a run will take, known before anything is allocated: announced to ComfyUI, and refused where it cannot fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from ..cache.joint import JointKVCache
from ..cache.prompt import PromptCache
from ..cache.rolling import RollingKVCache
from ..cache.sizes import CacheShape
from ..config import CACHE_STORAGES, MOST_FRAMES, CacheConfig, SamplingConfig
from ..devices import available_memory, check_memory
from ..geometry import TEXT_LENGTH, Geometry
from ..step_cache import StepShape


class Estimate(NamedTuple):
    """Bytes of a run, beside the weights, of all guidance branches together.

    cache: keys and values on the device, at their peak.
    prompts: keys and values of the prompts, on the device.
    step_cache: what a step cache keeps from step to step, on the device.
    activations: roughly what the largest pass needs beside these, on the device; it holds one chunk, several with the
        sampler "rolling", or the window at a joint prompt switch.
    host: keys and values that are kept in CPU memory.
    products: weights in float8 that fast passes keep beside the model's own, on the device.
    """

    cache: int
    prompts: int
    step_cache: int
    activations: int
    host: int
    products: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device altogether."""
        return self.cache + self.prompts + self.step_cache + self.activations + self.products


def estimate(
    transformer,
    height: int,
    width: int,
    *,
    sampling: SamplingConfig,
    cache: CacheConfig,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    frames: int = 0,
    prompt_tokens: int = TEXT_LENGTH,
    step_cache=None,
    weight_sets: int = 1,
    joint_switch: bool = False,
    ranks: int = 1,
    products: int = 0,
) -> Estimate:
    """What a session with these settings will take.

    transformer: a stock `WanTransformer3DModel`, which may be on the meta device.
    height, width: pixels.
    dtype: that the model computes in, by default the transformer's.
    frames: latent frames of the whole video; decides the size where the window is unlimited.
    prompt_tokens: padding included.
    step_cache: a method of `step_cache.METHODS`, or None.
    weight_sets: 2 for a model that has weights of its own for context passes, and so two sets of a prompt's keys.
    joint_switch: whether a prompt is switched on the way that takes the whole window through the model at once.
    ranks: processes that share the video; the bytes are those of one of them.
    products: bytes of one set of weights in float8, see `wan.fast.product_bytes`.
    """
    dtype = dtype or transformer.patch_embedding.weight.dtype
    shape = CacheShape.of(transformer, batch, *Geometry.of(transformer).latent_size(height, width), dtype)
    kind = JointKVCache if sampling.joint else RollingKVCache
    own = replace(shape, heads=shape.heads // ranks)
    kept = kind.bytes_needed(own, cache, cache.limit or frames)
    at_once = sampling.frames_at_once
    gathered = JointKVCache.bytes_gathered(own, cache, at_once) if sampling.joint else 0
    tokens = batch * at_once * shape.tokens_per_frame
    if joint_switch:
        at_once = max(at_once, min(cache.limit or frames, frames))
    largest = batch * at_once * shape.tokens_per_frame // ranks
    held = 0
    if step_cache is not None and not sampling.few_step:  # few-step sampling has none, see `start_step_cache`
        held = step_cache.bytes_held(_step_shape(transformer, shape, sampling, tokens))
    return Estimate(
        cache=kept.device * sampling.branches,
        prompts=PromptCache.bytes_needed(shape, prompt_tokens) * sampling.branches * weight_sets,
        step_cache=held,
        activations=largest * _values_per_token(transformer.config) * torch.float32.itemsize + gathered,
        host=kept.host * sampling.branches,
        products=products * weight_sets,
    )


def check_fits(
    transformer,
    height: int,
    width: int,
    *,
    sampling: SamplingConfig,
    cache: CacheConfig,
    device: torch.device,
    frames: int,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    decoding: int = 0,
    held: int = 0,
    **others,
) -> None:
    """Raise ValueError, with settings that would fit, if a run needs more RAM than is available now.

    On a CPU everything lies there. Beside another device, which says for itself when it is full, an offloaded cache and
    the finished latents do.

    device: where the model computes.
    frames: latent frames of the whole video.
    decoding: bytes that decoding takes on the device, in turn with the passes.
    held: bytes of all this that the process has already taken, such as a cache from an earlier run.
    others: as for `estimate`, and so are those that are not named here.
    """
    latent_size = Geometry.of(transformer).latent_size(height, width)
    dtype = dtype or transformer.patch_embedding.weight.dtype
    finished = batch * transformer.config.in_channels * latent_size[0] * latent_size[1] * dtype.itemsize

    def needed(cache: CacheConfig, frames: int = frames) -> int:
        run = estimate(
            transformer,
            height,
            width,
            sampling=sampling,
            cache=cache,
            dtype=dtype,
            batch=batch,
            frames=frames,
            **others,
        )
        computing = run.device + max(decoding - run.activations, 0) if device.type == "cpu" else 0
        return run.host + computing + frames * finished - held

    if needed(cache) > (available := available_memory()):
        remedies = what_fits(lambda *changed: needed(*changed) <= available, sampling, cache, frames)
        check_memory(needed(cache), "this video", ", ".join(remedies))


OFFLOAD_WEIGHTS = "offload the weights to CPU memory"
STANDARD_SPEED = "set the speed to standard instead of fast"


def what_fits(
    fits: Callable[..., bool],
    sampling: SamplingConfig,
    cache: CacheConfig,
    frames: int,
    weights: Iterable[str] = (),
) -> list[str]:
    """What a person can change so that a run fits, as phrases. fits: called with a cache and, if it is another, a length.

    frames: latent frames of the whole video. weights: phrases for what would fit of changes to the weights.
    """
    remedies = []
    least, now = cache.sink + sampling.chunk, cache.limit or frames
    windows = [size for size in range(least, min(now, MOST_FRAMES + 1)) if _works(sampling, cache, size)]
    if windows and fits(replace(cache, window=windows[0])):
        most = bisect_right(windows, False, key=lambda window: not fits(replace(cache, window=window)))
        remedies.append(f"set the window to at most {windows[most - 1]} latent frames")
    storages = [name for name in CACHE_STORAGES if fits(replace(cache, storage=name))]
    if storages:
        remedies.append(f"keep the cache as {' or '.join(storages)}")
    if not cache.offload and fits(replace(cache, offload=True)):
        remedies.append("offload the cache to CPU memory")
    remedies += weights
    if fits(cache, least):
        remedies.append("make the video shorter")
    return [*remedies, "make the picture smaller", "or close other programs"]


def _works(sampling: SamplingConfig, cache: CacheConfig, window: int) -> bool:
    """Whether the cache's rules go with that window."""
    try:
        sampling.check_cache(replace(cache, window=window))
    except ValueError:
        return False
    return True


def _values_per_token(config) -> int:
    """Float32 values that a block holds per token at its peak.

    A block of the stock transformer holds about ten tensors of the hidden size (modulation and residuals run in float32)
    or, in the feed-forward part, four of the hidden size and two of the inner size.
    """
    hidden = config.num_attention_heads * config.attention_head_dim
    return max(10 * hidden, 4 * hidden + 2 * config.ffn_dim)


def _step_shape(transformer, shape: CacheShape, sampling: SamplingConfig, tokens: int) -> StepShape:
    geometry = Geometry.of(transformer)
    return StepShape(
        branches=sampling.branches,
        layers=shape.layers,
        tokens=tokens,
        dim=shape.heads * shape.head_dim,
        latents=tokens * geometry.cells_per_token * geometry.channels,
        itemsize=shape.dtype.itemsize,
    )
