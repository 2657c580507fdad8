"""Pyramid Attention Broadcast: reuses each attention's output for a number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import hooks

from .method import StepCacheMethod, StepClock, StepShape, count, timesteps


@dataclass(frozen=True)
class PyramidAttentionBroadcast(StepCacheMethod):
    """Reuses each attention's output for a number of steps. https://arxiv.org/abs/2408.12588

    spatial_attention_block_skip_range: self-attention is computed every N steps; 1: always. (Wan has no separate
        temporal attention.) diffusers: unset, which it turns into 2.
    cross_attention_block_skip_range: the same for the attention to the prompt
    *_timestep_skip_range: reuse only between these timesteps
    """

    name: ClassVar[str] = "pab"
    title: ClassVar[str] = "Pyramid Attention Broadcast"
    aliases: ClassVar[tuple[str, ...]] = ("pab", "pyramid attention broadcast")

    spatial_attention_block_skip_range: int = count(2, "Self-attention is computed every so many steps.", 1)
    cross_attention_block_skip_range: int = count(1, "The same for attention to the prompt. 1: every step.", 1)
    spatial_attention_timestep_skip_range: tuple[float, float] = timesteps(100, 800, "self-attention is reused")
    cross_attention_timestep_skip_range: tuple[float, float] = timesteps(100, 800, "attention to the prompt is reused")

    def config(self, clock: StepClock):
        # None: nothing is kept of an attention that is always computed. diffusers turns two of them into its default.
        self_range, cross_range = self.spatial_attention_block_skip_range, self.cross_attention_block_skip_range
        make: Any = hooks.PyramidAttentionBroadcastConfig  # diffusers annotates int where any timestep will do
        return make(
            spatial_attention_block_skip_range=None if self_range == 1 < cross_range else self_range,
            cross_attention_block_skip_range=None if cross_range == 1 else cross_range,
            spatial_attention_timestep_skip_range=self.spatial_attention_timestep_skip_range,
            cross_attention_timestep_skip_range=self.cross_attention_timestep_skip_range,
            current_timestep_callback=clock.timestep,
        )

    def bytes_held(self, shape: StepShape) -> int:
        reused = (self.spatial_attention_block_skip_range > 1) + (self.cross_attention_block_skip_range > 1)
        return shape.branches * max(reused, 1) * shape.layers * shape.hidden

    @classmethod
    def strengths(cls, guided: bool) -> dict[str, StepCacheMethod]:
        wide = (100, 950)
        return {
            "self 2": cls(),
            "self 2, cross 6": cls(2, 6),
            "self 4, cross 6, to 950": cls(4, 6, wide, wide),
        }
