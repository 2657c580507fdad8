"""Krea Realtime: the frames in view are computed anew before every block."""

import torch

from rolling_kv.config import CacheConfig, SamplingConfig

from .case import Case, Prompt


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
        return CacheConfig(self.config["kv_cache_num_frames"] + self.chunk, positions="window", context="recomputed")

    def prompts(self) -> dict[int, Prompt]:
        """A new prompt is blended in; while it is, every block has embeddings of its own."""
        blends = {change["before_block"]: change["interpolation_steps"] for change in self.config["prompt_changes"]}
        current, waiting, prompts = self.tensors["prompt_embeds"], [], {}
        for block, start in enumerate(self.starts()):
            if block in blends:
                new = self.tensors[f"prompt_embeds.{block}"]
                waiting = [torch.lerp(current, new, share) for share in torch.linspace(0, 1, blends[block]).to(new)]
            if waiting:
                current = waiting.pop(0)
            prompts[start] = Prompt(current)
        return {0: prompts[self.given]} | prompts

    def noise(self, start: int, draw: int, shape: tuple) -> torch.Tensor:
        """The initial noise of a frame has the number of that frame, given ones counted; a video is mixed into it."""
        if draw:
            return super().noise(start, draw, shape)
        noise = self.tensors["noise"]
        if self.config["video_frames"]:
            share = self.config["warped_timesteps"][0] / 1000
            noise = self.tensors["video_latents"] * (1 - share) + noise * share
        return noise[:, start : start + shape[2]].transpose(1, 2)

    def give(self, session) -> None:
        if self.given:
            session.prefill(self.tensors["start_latents"].transpose(1, 2))
