"""FasterCache: makes up the unconditional branch from the conditional one, and reuses self-attention besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import hooks

from .method import JointBranches, StepCacheMethod, StepClock, StepShape, count, share, timesteps


@dataclass(frozen=True)
class FasterCache(StepCacheMethod):
    """Predicts the unconditional branch from the conditional one, and then also reuses self-attention.

    https://arxiv.org/abs/2410.19355. Without guidance there is no second branch: only attention is reused.

    unconditional_batch_skip_range: the unconditional branch is computed every N steps
    spatial_attention_block_skip_range: self-attention is computed every N of the steps that leave it out
    *_timestep_skip_range: skip only between these timesteps
    attention_weight: how far attention is extrapolated from its last two outputs. diffusers: a callback, 0.5 if unset
    alpha_low_frequency, alpha_high_frequency: growth per step of the remembered difference of the branches, within
        low_frequency_weight_update_timestep_range and high_frequency_weight_update_timestep_range
    """

    name: ClassVar[str] = "fastercache"
    title: ClassVar[str] = "FasterCache"
    aliases: ClassVar[tuple[str, ...]] = ("fastercache",)

    unconditional_batch_skip_range: int = count(5, "The negative branch is computed every so many steps.", 1)
    spatial_attention_block_skip_range: int = count(2, "Self-attention is computed every so many steps.", 1)
    unconditional_batch_timestep_skip_range: tuple[float, float] = timesteps(-1, 641, "the negative branch is left out")
    spatial_attention_timestep_skip_range: tuple[float, float] = timesteps(-1, 681, "self-attention is reused")
    attention_weight: float = share(0.5, "How far attention is extrapolated from the last two.", advanced=True)
    alpha_low_frequency: float = share(1.1, "Growth of the branches' difference, coarse part.", advanced=True)
    alpha_high_frequency: float = share(1.1, "Growth of the branches' difference, fine part.", advanced=True)
    low_frequency_weight_update_timestep_range: tuple[float, float] = timesteps(99, 901, "the coarse part grows")
    high_frequency_weight_update_timestep_range: tuple[float, float] = timesteps(-1, 301, "the fine part grows")

    def __post_init__(self):
        super().__post_init__()
        if self.spatial_attention_timestep_skip_range[1] > 999:
            raise ValueError(
                "spatial_attention_timestep_skip_range must end at 999 or lower, so that the first step is computed; "
                f"got {self.spatial_attention_timestep_skip_range}"
            )

    def config(self, clock: StepClock, *, guided: bool = False):
        make: Any = hooks.FasterCacheConfig  # diffusers annotates int where any timestep will do
        return make(
            unconditional_batch_skip_range=self.unconditional_batch_skip_range,
            spatial_attention_block_skip_range=self.spatial_attention_block_skip_range,
            unconditional_batch_timestep_skip_range=self.unconditional_batch_timestep_skip_range,
            spatial_attention_timestep_skip_range=self.spatial_attention_timestep_skip_range,
            attention_weight_callback=lambda _: self.attention_weight,
            alpha_low_frequency=self.alpha_low_frequency,
            alpha_high_frequency=self.alpha_high_frequency,
            low_frequency_weight_update_timestep_range=self.low_frequency_weight_update_timestep_range,
            high_frequency_weight_update_timestep_range=self.high_frequency_weight_update_timestep_range,
            current_timestep_callback=clock.timestep,
            is_guidance_distilled=not guided,
        )

    def bytes_held(self, shape: StepShape) -> int:
        spectra = 2 * torch.complex64.itemsize * shape.latents if shape.branches == 2 else 0
        return 2 * shape.layers * shape.hidden + spectra  # of attention, in the conditional branch alone

    @classmethod
    def strengths(cls, guided: bool) -> dict[str, StepCacheMethod]:
        if not guided:  # there is no unconditional branch to leave out
            return {
                "self 2, to 681": cls(),
                "self 2, to 950": cls(spatial_attention_timestep_skip_range=(-1, 950)),
            }
        return {
            "uncond 2, to 641": cls(2),
            "uncond 5, to 641": cls(),
            "uncond 5, to 950": cls(5, 2, (-1, 950), (-1, 950)),
        }

    def joint_branches(self, clock: StepClock) -> JointBranches:
        return _Denoiser(self.config(clock, guided=True))


class _Denoiser(JointBranches):
    """Both branches as one batch, unconditional first: what FasterCache's hook on the denoiser works on."""

    _run: Callable[[str, torch.Tensor], torch.Tensor]  # while `predict` runs

    def __init__(self, config):
        super().__init__()
        self.both = False
        self._batch = 0
        hooks.apply_faster_cache(self, config)

    def predict(self, x: torch.Tensor, run: Callable[[str, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        self._run, self._batch = run, x.shape[0]
        try:
            uncond, cond = self(hidden_states=torch.cat([x, x])).chunk(2)
        finally:
            del self._run
            self.both = False
        return [cond, uncond]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[0] == self._batch:  # the hook will make up the unconditional branch
            return self._run("cond", hidden_states)
        self.both = True
        uncond, cond = hidden_states.chunk(2)
        return torch.cat([self._run("uncond", uncond), self._run("cond", cond)])
