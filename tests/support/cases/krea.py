"""Krea Realtime: the frames in view are computed anew before every block."""

import torch

from rolling_kv.config import CacheConfig, SamplingConfig

from .case import Case, Prompt


class StandInVae:
    """The VAE of the recordings, as far as it is asked: channel by channel, and every latent frame for itself."""

    @staticmethod
    def reencoder():
        return lambda latents: reencoded(latents[:, :, -1:])


def reencoded(latents: torch.Tensor) -> torch.Tensor:
    """Latent frames [B, C, f, H, W], each decoded to its last pixel frame, and that encoded."""
    pixels, channels = torch.tanh(0.5 * latents[:, :3]), torch.arange(16).to(latents).view(-1, 1, 1, 1)
    return 1.5 * torch.tanh((2 - 0.1 * channels) * pixels[:, torch.arange(16) % 3])


class Krea(Case):
    bfloat16_allowance = 1.1

    @property
    def given(self) -> int:
        return self.config["kv_cache_num_frames"] if self.config["start_frame"] else 0

    def sampling(self) -> SamplingConfig:
        config = self.config
        steps = torch.linspace(1000 * config["strength"], 0, config["num_denoising_steps"]).int().tolist()
        return SamplingConfig(chunk=self.chunk, denoising_steps=tuple(steps), shift=config["timestep_shift"])

    def cache(self) -> CacheConfig:
        config = self.config
        return CacheConfig(
            config["kv_cache_num_frames"] + self.chunk,
            sink=int(config["keep_first_frame"]),
            positions="window",
            context="recomputed",
        )

    def vae(self) -> StandInVae:
        return StandInVae()

    def source(self) -> torch.Tensor | None:
        return self.tensors["video_latents"].transpose(1, 2) if self.config["video_frames"] else None

    def prompts(self) -> dict[int, Prompt]:
        """The prompts that are blended in, before the first block too."""
        changes = {change["before_block"]: change["interpolation_steps"] for change in self.config["prompt_changes"]}
        return {
            start: Prompt(self.tensors[f"prompt_embeds.{block}"], blend=changes[block])
            for block, start in enumerate(self.starts())
            if block in changes
        }

    def first_prompt(self) -> torch.Tensor:
        return self.tensors["prompt_embeds"]

    def noise(self, start: int, draw: int, shape: tuple) -> torch.Tensor:
        """The initial noise of a frame has the number of that frame, given ones counted."""
        if draw:
            return super().noise(start, draw, shape)
        return self.tensors["noise"][:, start : start + shape[2]].transpose(1, 2)

    def give(self, session) -> None:
        if self.given:
            session.prefill(self.tensors["start_latents"].transpose(1, 2))
