"""Plain bidirectional Wan sampling of one clip: all frames at once, no rolling cache, the stock transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .attention import attention_backend, check_backend, is_attached
from .config import SamplingConfig, check_size
from .model import CausalModel
from .schedule import sample_chunk, seeded_noise
from .step_cache import StepCacheReport, start_step_cache


class BidirectionalClip:
    """Samples one clip of `frames` latent frames in which every frame attends to every other.

    The mode of ordinary Wan models, and what step caches were made for. A causal model can be run so as well, for as
    many frames as it was trained to see at once.

    prompt, negative: text embeddings [B or 1, L, D], zero-padded; negative is needed with guidance only.
    height, width: pixels, multiples of 16. sampling: by default the model's preset; its chunk settings are not read.
    step_cache: a method of `step_cache.METHODS`. backend: of the attention, one of `attention.ATTENTION_BACKENDS`.
    on_pass: called as on_pass(done, total) before every model pass, a guided pair counting as one; whatever it raises
    cancels.
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
        backend: str | None = None,
        on_pass: Callable[[int, int], None] | None = None,
    ):
        if frames < 1:
            raise ValueError(f"a clip needs at least 1 latent frame, got {frames}")
        self.model = model
        self.sampling = sampling or model.preset.sampling
        if self.sampling.guided and negative is None:
            raise ValueError(
                f"guidance_scale is {self.sampling.guidance_scale}, which needs a negative prompt; give one, or set "
                "guidance to 1 to sample without"
            )
        self.shape = (batch, model.transformer.config.in_channels, frames, *check_size(height, width))
        check_backend(backend)
        self.backend = backend
        self.step_cache = step_cache
        self.step_report: StepCacheReport | None = None
        self.on_pass = on_pass
        embeds = [prompt, negative] if self.sampling.guided else [prompt]
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
        steps = self.sampling.passes_at(0)
        few_step = self.sampling.sampler == "renoise"
        cache = None
        if self.step_cache is not None:
            cache = start_step_cache(self.model.transformer, self.step_cache, steps=steps, few_step=few_step)
        passes = [self._branch(embeds) for embeds in self._embeds]
        done = 0

        def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
            nonlocal done
            if self.on_pass is not None:
                self.on_pass(done, steps)
            done += 1
            x = x.to(dtype)
            flows = cache.predict(x, timestep, passes) if cache else [run(x, timestep) for run in passes]
            return flows[0] if len(flows) == 1 else flows[1] + self.sampling.guidance_scale * (flows[0] - flows[1])

        def draw(index: int) -> torch.Tensor:
            return seeded_noise(seed, 0, self.shape, index).to(device, dtype if few_step else torch.float32)

        try:
            if cache:
                cache.begin()
            with torch.inference_mode(), attention_backend(self.model.transformer, self.backend):
                latents = sample_chunk(predict, draw, self.sampling, 0).to(dtype)
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
