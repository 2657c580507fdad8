"""First Block Cache: asks the first block whether the others are worth computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers import hooks

from .method import StepCacheMethod, StepClock, StepShape, share


@dataclass(frozen=True)
class FirstBlockCache(StepCacheMethod):
    """Computes the first block; where its effect has hardly changed, reuses what all the others did.

    https://github.com/chengzeyi/ParaAttention

    threshold: relative change of the first block's residual below which the rest is skipped
    """

    name: ClassVar[str] = "firstblock"
    title: ClassVar[str] = "First Block Cache"
    aliases: ClassVar[tuple[str, ...]] = ("first block cache", "fbcache")

    threshold: float = share(0.05, "Change of the first block's effect below which the other blocks are left out.")

    def config(self, clock: StepClock):
        return hooks.FirstBlockCacheConfig(threshold=self.threshold)

    def bytes_held(self, shape: StepShape) -> int:
        return shape.branches * 3 * shape.hidden

    @classmethod
    def strengths(cls, guided: bool) -> dict[str, StepCacheMethod]:
        return {f"threshold {threshold}": cls(threshold) for threshold in (0.05, 0.1, 0.2)}
