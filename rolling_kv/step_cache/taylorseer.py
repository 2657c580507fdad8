"""TaylorSeer: extrapolates what the layers would have put out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import hooks

from .method import StepCacheMethod, StepClock, StepShape, choice, count, switch

WAN_TAYLORSEER_MODULES = (r"blocks\.\d+\.attn[12]", r"blocks\.\d+\.ffn")


@dataclass(frozen=True)
class TaylorSeer(StepCacheMethod):
    """Extrapolates the output of every attention and feed-forward from its last full computations.

    https://arxiv.org/abs/2503.06923

    cache_interval: a full step every N steps
    max_order: 0 reuses, 1 extrapolates linearly, 2 and more with higher differences
    disable_cache_before_step: this many full steps first
    disable_cache_after_step: only full steps from this one on; None: never
    taylor_factors_dtype: precision of what is kept
    use_lite_mode: extrapolate only the model's last projection: least memory, and the blocks are skipped as a whole
    cache_identifiers: regular expressions of full module names. diffusers' own default matches nothing in a Wan model.
    """

    name: ClassVar[str] = "taylorseer"
    title: ClassVar[str] = "TaylorSeer"
    aliases: ClassVar[tuple[str, ...]] = ("taylorseer",)

    cache_interval: int = count(5, "A full step every so many steps; the others are extrapolated.", 1)
    max_order: int = count(1, "0 reuses, 1 extrapolates linearly, more with higher differences.")
    disable_cache_before_step: int = count(3, "So many full steps first.", 1)
    disable_cache_after_step: int | None = count(None, "Only full steps from this one on. 0: never.", advanced=True)
    taylor_factors_dtype: str = choice(("bfloat16", "float16", "float32"), "Precision of what is kept.", advanced=True)
    use_lite_mode: bool = switch(False, "Extrapolate only the result: least memory, less exact.")
    cache_identifiers: tuple[str, ...] = WAN_TAYLORSEER_MODULES

    def config(self, clock: StepClock):
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

    @classmethod
    def strengths(cls, guided: bool) -> dict[str, StepCacheMethod]:
        return {"every 3": cls(3), "every 5": cls(), "every 5, lite": cls(use_lite_mode=True)}
