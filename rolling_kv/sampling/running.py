"""What a session holds while it is open, and the passes that it makes through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..cache.joint import JointPass
from ..cache.prompt import Branch
from ..config import SamplingConfig
from ..step_cache import StepCache, StepProbe
from ..wan.attachment import RollingAttachment
from .branches import GuidanceBranches
from .denoiser import Denoiser, beside_given
from .history import History
from .prompting import Wanted


@dataclass
class Running:
    """A model with its caches attached, at one point of a video.

    attachment: of the weights that denoise.
    branches: the caches.
    history: brings them to a point of the video.
    sampling: how chunks are made.
    dtype: that the model computes in.
    steps: skips work between denoising steps, or watches them; None for neither.
    """

    attachment: RollingAttachment
    branches: GuidanceBranches
    history: History
    sampling: SamplingConfig
    dtype: torch.dtype
    steps: StepCache | StepProbe | None = None

    def denoiser(
        self, wanted: Wanted, frames: int, on_step: Callable[[], None], given: torch.Tensor | None = None
    ) -> Denoiser:
        """The steps of the next chunk, of so many latent frames. given: its first ones, clean latents [B, C, g, h, w]."""
        branches = self.branches.for_prompts(wanted.prompt, wanted.negative)
        for branch in branches:
            branch.cache.begin(frames)
        passes: list[Callable[..., torch.Tensor]] = [
            partial(self.attachment.predict, branch=branch) for branch in branches
        ]
        if given is not None:
            passes = [beside_given(run_pass, given) for run_pass in passes]
        return Denoiser(passes, self.sampling, self.dtype, self.steps, on_step)

    def joint_denoiser(self, wanted: Wanted, frames: int, on_step: Callable[[], None]) -> Denoiser:
        """One joint pass over so many latent frames, which reads the caches and writes nothing."""
        passes = [
            partial(self.attachment.predict, branch=_looking_at(branch, frames))
            for branch in self.branches.for_prompts(wanted.prompt, wanted.negative)
        ]
        return Denoiser(passes, self.sampling, self.dtype, None, on_step)


def _looking_at(branch: Branch, frames: int) -> Branch:
    """The branch for a joint pass over `frames` latent frames."""
    cache: Any = branch.cache
    seen: Any = JointPass(cache, frames)
    return Branch(seen, branch.prompt)
