"""MagCache: knows from constants of the model which steps change little. With the run that measures the constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import hooks

from .method import StepCacheMethod, StepClock, StepShape, count, numbers, share


@dataclass(frozen=True)
class MagCacheCalibration(StepCacheMethod):
    """Computes every step of a run and records MagCache's constants: `constants` of the run's `StepCacheReport`."""

    name: ClassVar[str] = "magcache-calibration"
    title: ClassVar[str] = "MagCache calibration"

    def config(self, clock: StepClock):
        # One step more than there are: at the last one diffusers would print the constants and forget them.
        return hooks.MagCacheConfig(calibrate=True, num_inference_steps=clock.steps + 1)

    def bytes_held(self, shape: StepShape) -> int:
        return shape.branches * 2 * shape.hidden

    def measured(self, hooks: list) -> list[float]:
        manager = next(hook.state_manager for hook in hooks)
        return list(manager._state_cache["cond"].calibration_ratios)


@dataclass(frozen=True)
class MagCache(StepCacheMethod):
    """Skips all blocks while constants calibrated for the model say that their effect keeps its magnitude.

    https://arxiv.org/abs/2506.09045

    threshold: error that may add up before a full step
    max_skip_steps: at most so many skipped steps in a row
    retention_ratio: share of the steps, from the first on, that are always full
    mag_ratios: the constants, one per step of the run they were calibrated in; interpolated to other numbers of steps.
        They belong to one checkpoint: make them with `MagCacheCalibration`.
    """

    name: ClassVar[str] = "magcache"
    title: ClassVar[str] = "MagCache"
    aliases: ClassVar[tuple[str, ...]] = ("magcache",)
    constants: ClassVar[str] = "mag_ratios"
    calibration: ClassVar[type[StepCacheMethod] | None] = MagCacheCalibration

    threshold: float = share(0.06, "Error that may add up before a full step.")
    max_skip_steps: int = count(3, "At most so many steps left out in a row.")
    retention_ratio: float = share(0.2, "Share of the steps, from the first on, that are always full.")
    mag_ratios: tuple[float, ...] = numbers(
        "The constants of this very model, one per step. Measure them once, as the help page says."
    )

    def config(self, clock: StepClock):
        if not self.mag_ratios:
            raise ValueError(
                "MagCache needs constants of this very model (mag_ratios): calibrate them once, with the "
                "node Benchmark Step Caches or `python -m rolling_kv bench caching`, which show them, or a run with "
                "MagCacheCalibration()"
            )
        return hooks.MagCacheConfig(
            threshold=self.threshold, max_skip_steps=self.max_skip_steps, retention_ratio=self.retention_ratio,
            num_inference_steps=clock.steps, mag_ratios=torch.tensor(self.mag_ratios),
        )  # fmt: skip

    def bytes_held(self, shape: StepShape) -> int:
        return shape.branches * 2 * shape.hidden

    @classmethod
    def strengths(cls, guided: bool) -> dict[str, StepCacheMethod]:
        known = ((0.06, 3), (0.12, 4), (0.24, 6))
        return {f"threshold {threshold}, {steps} in a row": cls(threshold, steps) for threshold, steps in known}
