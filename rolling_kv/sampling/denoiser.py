"""One denoising step: every guidance branch through the model, and one flow out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..config import SamplingConfig
from ..step_cache import StepCache, StepProbe


class Denoiser:
    """Predicts the flow that a sampler integrates, for one chunk: a step cache begins anew with each.

    passes: the conditional branch, then with guidance the unconditional one.
    sampling: tells the guidance scale.
    dtype: that the model computes in.
    step_cache: skips work between the steps, or watches them; None for neither.
    on_step: called before every step; whatever it raises cancels.
    """

    def __init__(
        self,
        passes: Sequence[Callable[[torch.Tensor, Any], torch.Tensor]],
        sampling: SamplingConfig,
        dtype: torch.dtype,
        step_cache: StepCache | StepProbe | None,
        on_step: Callable[[], None],
    ):
        self.passes = list(passes)
        self.sampling = sampling
        self.dtype = dtype
        self.step_cache = step_cache
        self.on_step = on_step
        if step_cache is not None:
            step_cache.begin()

    def __call__(self, x: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The predicted flow of x_t, [B, C, f, h, w]; timestep: 0 to 1000, or without a step cache one for each frame."""
        self.on_step()
        x = x.to(self.dtype)
        if self.step_cache is not None:
            flows = self.step_cache.predict(x, timestep, self.passes)
        else:
            flows = [run(x, timestep) for run in self.passes]
        if len(flows) == 1:
            return flows[0]
        cond, uncond = flows
        return uncond + self.sampling.guidance_scale * (cond - uncond)


def beside_given(run: Callable[..., torch.Tensor], given: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A pass over a chunk whose first frames are given: they go through the model clean, at timestep 0.

    run: the pass over a chunk. given: latents [B, C, g, h, w].
    """
    frames = given.shape[2]

    def beside(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return run(with_given(x, given), [0.0] * frames + [timestep] * (x.shape[2] - frames))

    return beside


def with_given(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """A chunk with the given frames in the place of its first ones, [B, C, f, h, w]."""
    return torch.cat([given.to(x.device, x.dtype), x[:, :, given.shape[2] :]], dim=2)


def noise_dtype(sampling: SamplingConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a chunk's noise for a model of `dtype`: solvers work in float32, re-noising in the model's own."""
    return dtype if sampling.few_step else torch.float32


def needed_negative(sampling: SamplingConfig, negative: torch.Tensor | None) -> torch.Tensor | None:
    """The negative prompt where there is guidance, else None. Raises ValueError if guidance lacks it."""
    if not sampling.guided:
        return None
    if negative is None:
        raise ValueError(
            f"guidance_scale is {sampling.guidance_scale}, which needs a negative prompt; connect one, "
            "or set guidance to 1 to sample without"
        )
    return negative
