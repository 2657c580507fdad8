"""Rolling-Forcing: a window of blocks at falling noise levels, denoised together."""

import torch

from rolling_kv.config import CacheConfig, SamplingConfig

from .case import Case, Prompt


class RollingForcing(Case):
    def sampling(self) -> SamplingConfig:
        config = self.config
        return SamplingConfig(
            chunk=self.chunk,
            sampler="rolling",
            denoising_steps=tuple(config["denoising_step_list"]),
            shift=config["timestep_shift"],
            context_noise=config["context_noise"],
        )

    def cache(self) -> CacheConfig:
        return CacheConfig(self.config["max_attention_frames"], self.config["anchor_frames"])

    def prompts(self) -> dict[int, Prompt]:
        return {0: Prompt(self.tensors["prompt_embeds"])}

    def noise(self, start: int, draw: int, shape: tuple) -> torch.Tensor:
        """A block is renoised for the n-th time after the window n - 1 windows behind the one that it enters in."""
        block = start // self.chunk
        if draw == 0:
            return super().noise(start, draw, shape)
        return self.tensors[f"renoise.{block + draw - 1}.{block}"].transpose(1, 2)
