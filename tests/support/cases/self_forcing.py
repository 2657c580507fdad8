"""Self-Forcing: frames at their own numbers, a sink that stays, few steps or many with guidance."""

from dataclasses import replace

import torch
from reference import NaiveRun

from rolling_kv.config import ALL_FRAMES, SamplingConfig

from .case import Case, Prompt


class SelfForcing(Case):
    @property
    def sampler(self) -> str:
        """ "renoise" or "unipc"."""
        return self.config["sampler"]

    @property
    def frames_stay(self) -> bool:
        """No frame ever leaves the window."""
        return self.window == ALL_FRAMES or self.total <= self.window

    def sampling(self) -> SamplingConfig:
        config = self.config
        return replace(
            super().sampling(),
            sampler=self.sampler,
            num_inference_steps=config["num_inference_steps"],
            guidance_scale=config["guidance_scale"],
        )

    def prompts(self) -> dict[int, Prompt]:
        return {0: Prompt(self.tensors["prompt_embeds"])}

    def run_naively(self) -> torch.Tensor:
        """What the naive reference makes of a few-step case at batch 1, [B, F, C, H, W]."""
        model = self.model(torch.float32)
        reference = NaiveRun(model, self.tensors["prompt_embeds"])
        made = []
        if self.given:
            made.append(self.tensors["initial_latent"].transpose(1, 2))
            reference.prefill(made[0])
        while reference.start < self.total:
            start = reference.start
            shape = (1, 16, model.preset.sampling.chunk_size(start), self.config["height"], self.config["width"])
            made.append(reference.chunk(lambda draw: self.noise(start, draw, shape)))
        return torch.cat(made, dim=2).transpose(1, 2)
