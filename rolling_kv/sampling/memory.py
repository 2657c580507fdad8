"""What a run will take, known before anything is allocated: announced to ComfyUI, shown by `inspect`, compared by tests."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..cache.prompt import PromptCache
from ..cache.rolling import RollingKVCache
from ..cache.sizes import CacheShape
from ..config import CacheConfig, SamplingConfig
from ..geometry import TEXT_LENGTH, Geometry
from ..step_cache import StepShape


class Estimate(NamedTuple):
    """Bytes of a run, beside the weights, of all guidance branches together.

    cache: keys and values on the device, at their peak.
    prompts: keys and values of the prompts, on the device.
    step_cache: what a step cache keeps from step to step, on the device.
    activations: roughly what a pass over one chunk needs beside these, on the device.
    host: keys and values that are kept in CPU memory.
    """

    cache: int
    prompts: int
    step_cache: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device altogether."""
        return self.cache + self.prompts + self.step_cache + self.activations


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
) -> Estimate:
    """What a session with these settings will take.

    transformer: a stock `WanTransformer3DModel`, which may be on the meta device.
    height, width: pixels.
    dtype: that the model computes in, by default the transformer's.
    frames: latent frames of the whole video; decides the size where the window is unlimited.
    prompt_tokens: padding included.
    step_cache: a method of `step_cache.METHODS`, or None.
    """
    dtype = dtype or transformer.patch_embedding.weight.dtype
    shape = CacheShape.of(transformer, batch, *Geometry.of(transformer).latent_size(height, width), dtype)
    kept = RollingKVCache.bytes_needed(shape, cache, cache.limit or frames)
    tokens = batch * sampling.chunk * shape.tokens_per_frame
    held = 0
    if step_cache is not None and not sampling.few_step:  # few-step sampling has none, see `start_step_cache`
        held = step_cache.bytes_held(_step_shape(transformer, shape, sampling, tokens))
    return Estimate(
        cache=kept.device * sampling.branches,
        prompts=PromptCache.bytes_needed(shape, prompt_tokens) * sampling.branches,
        step_cache=held,
        activations=tokens * _values_per_token(transformer.config) * torch.float32.itemsize,
        host=kept.host * sampling.branches,
    )


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
