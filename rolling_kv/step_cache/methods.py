"""The step-caching methods of diffusers as frozen values. What they do is diffusers' code; see `docs/caching.md`.

A step cache skips work between the denoising steps of one clip or chunk. Field names and defaults are diffusers', the
ones that matter most come first. Defaults that diffusers leaves to the user are named where they stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import diffusers
import torch
from diffusers import hooks


class Run(NamedTuple):
    """What a method must know about the run it is attached to."""

    timestep: Callable[[], float]  # of the pass under way, 0 to 1000
    steps: int  # denoising steps of a chunk


class StepShape(NamedTuple):
    """The size of one denoising step, for what a method keeps of it: its `bytes_held(shape)`, of all branches together.

    branches: 2 with guidance. tokens: of the whole batch, after patches are made. latents: values of the latents of the
    whole batch. itemsize: bytes of a value in the model's dtype.
    """

    branches: int
    layers: int
    tokens: int
    dim: int
    latents: int
    itemsize: int

    @property
    def hidden(self) -> int:
        """Bytes of one tensor of the hidden size."""
        return self.tokens * self.dim * self.itemsize


@dataclass(frozen=True)
class PyramidAttentionBroadcast:
    """Reuses each attention's output for a number of steps. https://arxiv.org/abs/2408.12588

    spatial_attention_block_skip_range: self-attention is computed every N steps; 1: always. (Wan has no separate
        temporal attention.) diffusers: unset, which it turns into 2.
    cross_attention_block_skip_range: the same for the attention to the prompt.
    *_timestep_skip_range: reuse only between these timesteps.
    """

    name: ClassVar[str] = "pab"
    title: ClassVar[str] = "Pyramid Attention Broadcast"

    spatial_attention_block_skip_range: int = 2
    cross_attention_block_skip_range: int = 1
    spatial_attention_timestep_skip_range: tuple[float, float] = (100, 800)
    cross_attention_timestep_skip_range: tuple[float, float] = (100, 800)

    def __post_init__(self):
        _at_least(1, self, "spatial_attention_block_skip_range", "cross_attention_block_skip_range")
        _ranges(self, "spatial_attention_timestep_skip_range", "cross_attention_timestep_skip_range")

    def config(self, run: Run):
        # None: nothing is kept of an attention that is always computed. diffusers turns two of them into its default.
        self_range, cross_range = self.spatial_attention_block_skip_range, self.cross_attention_block_skip_range
        return hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=None if self_range == 1 < cross_range else self_range,
            cross_attention_block_skip_range=None if cross_range == 1 else cross_range,
            spatial_attention_timestep_skip_range=self.spatial_attention_timestep_skip_range,
            cross_attention_timestep_skip_range=self.cross_attention_timestep_skip_range,
            current_timestep_callback=run.timestep,
        )

    def bytes_held(self, shape: StepShape) -> int:
        reused = (self.spatial_attention_block_skip_range > 1) + (self.cross_attention_block_skip_range > 1)
        return shape.branches * max(reused, 1) * shape.layers * shape.hidden


@dataclass(frozen=True)
class FasterCache:
    """Predicts the unconditional branch from the conditional one, and then also reuses self-attention.

    https://arxiv.org/abs/2410.19355. Without guidance there is no second branch: only attention is reused.

    unconditional_batch_skip_range: the unconditional branch is computed every N steps.
    spatial_attention_block_skip_range: self-attention is computed every N of the steps that leave it out.
    *_timestep_skip_range: skip only between these timesteps.
    attention_weight: how far attention is extrapolated from its last two outputs. diffusers: a callback, 0.5 if unset.
    alpha_low_frequency, alpha_high_frequency: growth per step of the remembered difference of the branches, within
        low_frequency_weight_update_timestep_range and high_frequency_weight_update_timestep_range.
    """

    name: ClassVar[str] = "fastercache"
    title: ClassVar[str] = "FasterCache"

    unconditional_batch_skip_range: int = 5
    spatial_attention_block_skip_range: int = 2
    unconditional_batch_timestep_skip_range: tuple[float, float] = (-1, 641)
    spatial_attention_timestep_skip_range: tuple[float, float] = (-1, 681)
    attention_weight: float = 0.5
    alpha_low_frequency: float = 1.1
    alpha_high_frequency: float = 1.1
    low_frequency_weight_update_timestep_range: tuple[float, float] = (99, 901)
    high_frequency_weight_update_timestep_range: tuple[float, float] = (-1, 301)

    def __post_init__(self):
        _at_least(1, self, "unconditional_batch_skip_range", "spatial_attention_block_skip_range")
        _ranges(self, *(name for name in vars(self) if name.endswith("timestep_skip_range")))
        if self.spatial_attention_timestep_skip_range[1] > 999:
            raise ValueError(
                "spatial_attention_timestep_skip_range must end at 999 or lower, so that the first step is computed; "
                f"got {self.spatial_attention_timestep_skip_range}"
            )

    def config(self, run: Run, *, guided: bool = False):
        return hooks.FasterCacheConfig(
            unconditional_batch_skip_range=self.unconditional_batch_skip_range,
            spatial_attention_block_skip_range=self.spatial_attention_block_skip_range,
            unconditional_batch_timestep_skip_range=self.unconditional_batch_timestep_skip_range,
            spatial_attention_timestep_skip_range=self.spatial_attention_timestep_skip_range,
            attention_weight_callback=lambda _: self.attention_weight,
            alpha_low_frequency=self.alpha_low_frequency,
            alpha_high_frequency=self.alpha_high_frequency,
            low_frequency_weight_update_timestep_range=self.low_frequency_weight_update_timestep_range,
            high_frequency_weight_update_timestep_range=self.high_frequency_weight_update_timestep_range,
            current_timestep_callback=run.timestep,
            is_guidance_distilled=not guided,
        )

    def bytes_held(self, shape: StepShape) -> int:
        spectra = 2 * torch.complex64.itemsize * shape.latents if shape.branches == 2 else 0
        return 2 * shape.layers * shape.hidden + spectra  # of attention, in the conditional branch alone


@dataclass(frozen=True)
class FirstBlockCache:
    """Computes the first block; where its effect has hardly changed, reuses what all the others did.

    https://github.com/chengzeyi/ParaAttention

    threshold: relative change of the first block's residual below which the rest is skipped.
    """

    name: ClassVar[str] = "firstblock"
    title: ClassVar[str] = "First Block Cache"

    threshold: float = 0.05

    def __post_init__(self):
        _at_least(0, self, "threshold")

    def config(self, run: Run):
        return hooks.FirstBlockCacheConfig(threshold=self.threshold)

    def bytes_held(self, shape: StepShape) -> int:
        return shape.branches * 3 * shape.hidden


WAN_TAYLORSEER_MODULES = (r"blocks\.\d+\.attn[12]", r"blocks\.\d+\.ffn")


@dataclass(frozen=True)
class TaylorSeer:
    """Extrapolates the output of every attention and feed-forward from its last full computations.

    https://arxiv.org/abs/2503.06923

    cache_interval: a full step every N steps.
    max_order: 0 reuses, 1 extrapolates linearly, 2 and more with higher differences.
    disable_cache_before_step: this many full steps first.
    disable_cache_after_step: only full steps from this one on; None: never.
    taylor_factors_dtype: precision of what is kept.
    use_lite_mode: extrapolate only the model's last projection: least memory, and the blocks are skipped as a whole.
    cache_identifiers: regular expressions of full module names. diffusers' own default matches nothing in a Wan model.
    """

    name: ClassVar[str] = "taylorseer"
    title: ClassVar[str] = "TaylorSeer"

    cache_interval: int = 5
    max_order: int = 1
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    taylor_factors_dtype: str = "bfloat16"
    use_lite_mode: bool = False
    cache_identifiers: tuple[str, ...] = WAN_TAYLORSEER_MODULES

    def __post_init__(self):
        _at_least(1, self, "cache_interval", "disable_cache_before_step")
        _at_least(0, self, "max_order")
        if self.taylor_factors_dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(
                f"taylor_factors_dtype must be bfloat16, float16 or float32, got {self.taylor_factors_dtype!r}"
            )

    def config(self, run: Run):
        return hooks.TaylorSeerCacheConfig(
            cache_interval=self.cache_interval,
            max_order=self.max_order,
            disable_cache_before_step=self.disable_cache_before_step,
            disable_cache_after_step=self.disable_cache_after_step,
            taylor_factors_dtype=getattr(torch, self.taylor_factors_dtype),
            use_lite_mode=self.use_lite_mode,
            cache_identifiers=None if self.use_lite_mode else list(self.cache_identifiers),
        )

    def bytes_held(self, shape: StepShape) -> int:
        """With the default `cache_identifiers`."""
        values = shape.latents if self.use_lite_mode else 3 * shape.layers * shape.tokens * shape.dim
        return shape.branches * (self.max_order + 1) * values * getattr(torch, self.taylor_factors_dtype).itemsize


@dataclass(frozen=True)
class MagCache:
    """Skips all blocks while constants calibrated for the model say that their effect keeps its magnitude.

    https://arxiv.org/abs/2506.09045

    threshold: error that may add up before a full step.
    max_skip_steps: at most so many skipped steps in a row.
    retention_ratio: share of the steps, from the first on, that are always full.
    mag_ratios: the constants, one per step of the run they were calibrated in; interpolated to other numbers of steps.
        They belong to one checkpoint: make them with `MagCacheCalibration`.
    """

    name: ClassVar[str] = "magcache"
    title: ClassVar[str] = "MagCache"

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    mag_ratios: tuple[float, ...] = ()

    def __post_init__(self):
        _at_least(0, self, "threshold", "max_skip_steps", "retention_ratio")

    def config(self, run: Run):
        if not self.mag_ratios:
            raise ValueError(
                "MagCache needs constants of this very model (mag_ratios): calibrate them once, with the "
                "node Benchmark Step Caches or `python -m rolling_kv bench caching`, which show them, or a run with "
                "MagCacheCalibration()"
            )
        return hooks.MagCacheConfig(
            threshold=self.threshold, max_skip_steps=self.max_skip_steps, retention_ratio=self.retention_ratio,
            num_inference_steps=run.steps, mag_ratios=torch.tensor(self.mag_ratios),
        )  # fmt: skip

    def bytes_held(self, shape: StepShape) -> int:
        return shape.branches * 2 * shape.hidden


@dataclass(frozen=True)
class MagCacheCalibration:
    """Computes every step of a run and records MagCache's constants: `mag_ratios` of the run's `StepCacheReport`."""

    name: ClassVar[str] = "magcache-calibration"
    title: ClassVar[str] = "MagCache calibration"

    def config(self, run: Run):
        # One step more than there are: at the last one diffusers would print the constants and forget them.
        return hooks.MagCacheConfig(calibrate=True, num_inference_steps=run.steps + 1)


@dataclass(frozen=True)
class SeaCache:
    """Skips all blocks while the clean part of the latents, filtered out by frequency, has hardly changed.

    https://huggingface.co/papers/2602.18993. Needs diffusers 0.42.

    threshold: relative change that may add up before a full step.
    residual_order: 0 reuses what the blocks did, 1 extrapolates it linearly.
    max_consecutive_cached: at most so many skipped steps in a row; 0: no limit.
    retention_steps, cache_end_steps: first and last steps that are always full.
    power_exp: how steeply natural video falls off with frequency.
    """

    name: ClassVar[str] = "seacache"
    title: ClassVar[str] = "SeaCache"

    threshold: float = 0.25
    residual_order: int = 1
    max_consecutive_cached: int = 2
    retention_steps: int = 1
    cache_end_steps: int = 1
    power_exp: float = 3.0

    def config(self, run: Run):
        if reason := why_unavailable(type(self)):
            raise ValueError(f"{reason}: update it, or choose another step cache")
        return hooks.SeaCacheConfig(
            threshold=self.threshold, residual_order=self.residual_order, retention_steps=self.retention_steps,
            max_consecutive_cached=self.max_consecutive_cached, cache_end_steps=self.cache_end_steps,
            power_exp=self.power_exp,
        )  # fmt: skip

    def bytes_held(self, shape: StepShape) -> int:
        # In float32 the filtered latents are the real half of complex numbers.
        indicator = shape.latents * (shape.itemsize if shape.itemsize < 4 else 2 * shape.itemsize)
        return shape.branches * ((self.residual_order + 1) * shape.hidden + indicator)


METHODS = {
    method.name: method
    for method in (PyramidAttentionBroadcast, FasterCache, FirstBlockCache, TaylorSeer, MagCache, SeaCache)
}
"""The methods by name."""


def why_unavailable(method: type) -> str:
    """Why this method cannot run with the diffusers that is installed; empty if it can."""
    if method is SeaCache and not hasattr(hooks, "SeaCacheConfig"):
        return f"SeaCache needs diffusers 0.42 or newer, and {diffusers.__version__} is installed"
    return ""


def _at_least(lowest: float, method, *names: str) -> None:
    for name in names:
        value = getattr(method, name)
        if not math.isfinite(value) or value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")


def _ranges(method, *names: str) -> None:
    for name in names:
        low, high = getattr(method, name)
        if not low < high:
            raise ValueError(f"{name} must rise, as in (100, 800), got {(low, high)}")
