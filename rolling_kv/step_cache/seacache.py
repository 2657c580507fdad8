"""SeaCache: looks at the clean part of the latents, by frequency, to tell whether a step is worth computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
from diffusers import hooks

from .method import StepCacheMethod, StepClock, StepShape, count, share


@dataclass(frozen=True)
class SeaCache(StepCacheMethod):
    """Skips all blocks while the clean part of the latents, filtered out by frequency, has hardly changed.

    https://huggingface.co/papers/2602.18993. Needs diffusers 0.42.

    threshold: relative change that may add up before a full step
    residual_order: 0 reuses what the blocks did, 1 extrapolates it linearly
    max_consecutive_cached: at most so many skipped steps in a row; 0: no limit
    retention_steps, cache_end_steps: first and last steps that are always full
    power_exp: how steeply natural video falls off with frequency
    """

    name: ClassVar[str] = "seacache"
    title: ClassVar[str] = "SeaCache"
    aliases: ClassVar[tuple[str, ...]] = ("seacache",)

    threshold: float = share(0.25, "Change of the filtered latents that may add up before a full step.")
    residual_order: int = count(1, "0 reuses what the blocks did, 1 extrapolates it.", 0, 1)
    max_consecutive_cached: int = count(2, "At most so many steps left out in a row. 0: no limit.")
    retention_steps: int = count(1, "So many full steps first.", advanced=True)
    cache_end_steps: int = count(1, "So many full steps last.", advanced=True)
    power_exp: float = share(3.0, "How steeply natural video falls off with frequency.", advanced=True)

    def config(self, clock: StepClock):
        if reason := self.why_unavailable():
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

    @classmethod
    def strengths(cls, guided: bool) -> dict[str, StepCacheMethod]:
        return {f"threshold {threshold}": cls(threshold) for threshold in (0.1, 0.25, 0.5)}

    @classmethod
    def why_unavailable(cls) -> str:
        if hasattr(hooks, "SeaCacheConfig"):
            return ""
        return f"SeaCache needs diffusers 0.42 or newer, and {diffusers.__version__} is installed"

    def place(self, step: int, steps: int, timestep: float) -> dict[str, Any]:
        return dict(step_index=step, num_inference_steps=steps, sigma=timestep / 1000)
