"""Plain bidirectional Wan sampling of one clip: all frames at once, no rolling cache, the stock transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..checkpoints.model import CausalModel
from ..config import ExecutionConfig, SamplingConfig
from ..step_cache import StepCacheReport, start_step_cache
from ..wan.attachment import is_attached
from ..wan.execution import attention_backend
from .denoiser import Denoiser, needed_negative, noise_dtype
from .schedule import chunk_noise, sample_chunk


class BidirectionalClip:
    """Samples one clip of `frames` latent frames in which every frame attends to every other.

    The mode of ordinary Wan models, and what step caches were made for. A causal model can be run so as well, for as
    many frames as it was trained to see at once.

    model: restored when the clip is done.
    prompt: text embeddings [B or 1, L, D], zero-padded.
    height, width: pixels, multiples of what the model's geometry asks for.
    frames: latent frames of the clip.
    negative: embeddings of the negative prompt; needed with guidance only.
    batch: clips made side by side.
    sampling: by default the model's preset; its chunk settings are not read.
    step_cache: a method of `step_cache.METHODS`.
    execution: only its attention backend is read.
    on_pass: called as on_pass(done, total) before every model pass, a guided pair counting as one; whatever it raises
        cancels.

    Raises ValueError for sizes, settings and prompts that cannot work.
    """

    def __init__(
        self,
        model: CausalModel,
        prompt: torch.Tensor,
        *,
        height: int,
        width: int,
        frames: int,
        negative: torch.Tensor | None = None,
        batch: int = 1,
        sampling: SamplingConfig | None = None,
        step_cache=None,
        execution: ExecutionConfig | None = None,
        on_pass: Callable[[int, int], None] | None = None,
    ):
        if frames < 1:
            raise ValueError(f"a clip needs at least 1 latent frame, got {frames}")
        self.model = model
        self.sampling = sampling or model.preset.sampling
        negative = needed_negative(self.sampling, negative)
        geometry = model.geometry
        self.shape = (batch, geometry.channels, frames, *geometry.latent_size(height, width))
        self.execution = execution or ExecutionConfig()
        self.execution.check()
        self.step_cache = step_cache
        self.step_report: StepCacheReport | None = None
        self.on_pass = on_pass
        embeds = [prompt] if negative is None else [prompt, negative]
        self._embeds = [e.to(model.compute_device(), model.dtype).expand(batch, -1, -1) for e in embeds]

    def sample(self, seed: int = 0) -> torch.Tensor:
        """The clean latents, [B, C, F, h, w] in model space. `step_report` then tells what the step cache did.

        Raises ValueError while a rolling cache is attached to the model.
        """
        if is_attached(self.model.transformer):
            raise ValueError(
                "a rolling cache is attached to this model: close its session before sampling a whole clip"
            )
        device, dtype = self.model.compute_device(), self.model.dtype
        steps, cache = self.sampling.passes_at(0), None
        if self.step_cache is not None:
            cache = start_step_cache(
                self.model.transformer, self.step_cache, steps=steps, few_step=self.sampling.few_step
            )
        passes = [self._branch(embeds) for embeds in self._embeds]
        done = 0

        def on_step() -> None:
            nonlocal done
            if self.on_pass is not None:
                self.on_pass(done, steps)
            done += 1

        noise = chunk_noise(None, seed, 0, self.shape, noise_dtype(self.sampling, dtype), device)
        try:
            predict = Denoiser(passes, self.sampling, dtype, cache, on_step)
            with torch.inference_mode(), attention_backend(self.model.transformer, self.execution.backend):
                latents = sample_chunk(predict, noise, self.sampling, 0).to(dtype)
            self.step_report = cache.report() if cache else None
        finally:
            if cache:
                cache.detach()
        return latents

    def _branch(self, embeds: torch.Tensor):
        transformer = self.model.transformer

        def run(x: torch.Tensor, timestep: float) -> torch.Tensor:
            timesteps = torch.full((x.shape[0],), timestep, device=x.device)
            return transformer(x, timesteps, embeds, return_dict=False)[0]

        return run
