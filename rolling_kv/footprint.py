"""Bytes that a run will take on the device, known before anything is allocated: what the nodes announce to ComfyUI."""

from __future__ import annotations

import math

import torch

from .cache import CacheShape, PromptCache, RollingKVCache
from .config import TEXT_LENGTH, CacheConfig, SamplingConfig, check_size
from .model import CausalModel
from .step_cache import StepShape


def working_bytes(
    model: CausalModel,
    height: int,
    width: int,
    *,
    batch: int = 1,
    sampling: SamplingConfig | None = None,
    cache: CacheConfig | None = None,
    frames: int = 0,
    prompt_tokens: int = TEXT_LENGTH,
) -> int:
    """Bytes on the device that a session will allocate for rolling and prompt caches, of every guidance branch.

    frames: latent frames of the whole video; decides the size when the window is unlimited.
    """
    sampling = sampling or model.preset.sampling
    cache = cache or model.preset.cache
    shape = CacheShape.of(model.transformer, batch, *check_size(height, width), model.dtype)
    kept = frames if cache.window == -1 else cache.window
    branch = RollingKVCache.bytes_needed(shape, cache, kept).device + PromptCache.bytes_needed(shape, prompt_tokens)
    return branch * (2 if sampling.guided else 1)


def activation_bytes(
    model: CausalModel, height: int, width: int, *, batch: int = 1, sampling: SamplingConfig | None = None
) -> int:
    """Rough bytes that a pass over one chunk needs beside weights and caches.

    Basis: at its peak, a block of the stock transformer holds about ten float32 tensors of the hidden size (modulation
    and residuals run in float32) or, in the feed-forward part, four of the hidden size and two of the inner size.
    """
    config = model.transformer.config
    latent_height, latent_width = check_size(height, width)
    tokens = batch * (sampling or model.preset.sampling).chunk * (latent_height // 2) * (latent_width // 2)
    hidden = config.num_attention_heads * config.attention_head_dim
    return tokens * max(10 * hidden, 4 * hidden + 2 * config.ffn_dim) * torch.float32.itemsize


def step_cache_bytes(
    model: CausalModel, height: int, width: int, method, *, batch: int = 1, sampling: SamplingConfig | None = None
) -> int:
    """Bytes on the device that a step cache (a method of `step_cache.METHODS`, or None) keeps from step to step.

    Few-step sampling has none; see `step_cache.start_step_cache`.
    """
    sampling = sampling or model.preset.sampling
    if method is None or sampling.sampler == "renoise":
        return 0
    config = model.transformer.config
    latent_height, latent_width = check_size(height, width)
    positions = batch * sampling.chunk * latent_height * latent_width
    shape = StepShape(
        branches=2 if sampling.guided else 1,
        layers=config.num_layers,
        tokens=positions // math.prod(config.patch_size),
        dim=config.num_attention_heads * config.attention_head_dim,
        latents=positions * config.in_channels,
        itemsize=model.dtype.itemsize,
    )
    return method.bytes_held(shape)
