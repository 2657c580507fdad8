"""LongLive 2: UniPC in few steps, and shots: a text that begins with the marker is a cut."""

from dataclasses import replace

import torch

from rolling_kv.config import CacheConfig, SamplingConfig

from .case import Case, Prompt


class LongLive2(Case):
    @property
    def has_image(self) -> bool:
        """Whether the first frame of the first chunk is given."""
        return self.config["independent_first_frame"] and self.config["num_initial"] == 1

    @property
    def given(self) -> int:
        return 0 if self.has_image else super().given

    @property
    def window(self):
        """Three chunks where the original is given none."""
        return 3 * self.chunk if self.config["local_attn_size"] == -1 else super().window

    def sampling(self) -> SamplingConfig:
        config = self.config
        return SamplingConfig(
            chunk=self.chunk,
            independent_first_frame=config["independent_first_frame"] and not self.has_image,
            sampler="unipc",
            num_inference_steps=config["sampling_steps"],
            shift=config["timestep_shift"],
            guidance_scale=config["guidance_scale"],
            given_frame="in chunk" if self.has_image else "own chunk",
        )

    def cache(self) -> CacheConfig:
        config, cache = self.config, super().cache()
        return replace(
            cache,
            switch="hold",
            cut_flush=False,
            cut_offset=config["multi_shot_rope_offset"] if cache.positions == "absolute" else 0,
            shot_sink=config["multi_shot_sink"],
            shot_clean=config["shot_clean_recache"] and config["multi_shot_sink"] and cache.sink > 0,
        )

    def prompts(self) -> dict[int, Prompt]:
        """In a batch the first sample's texts decide the cuts of all."""
        prompts = {}
        for start, texts in zip(self.starts(), zip(*self.config["chunk_texts"])):
            cut = self.config["texts"][texts[0]].startswith(self.config["scene_cut_prefix"])
            prompts[start] = Prompt(self.tensors["prompt_embeds"][list(texts)], "cut" if cut else None)
        return {0: prompts[self.given]} | prompts

    def negative(self) -> torch.Tensor | None:
        recorded = self.tensors.get("negative_prompt_embeds")
        return None if recorded is None else recorded[None]

    def slots(self) -> dict[str]:
        first, count = self.config["end"]["pin"] or (0, 0)
        return {"sink": range(self.config["sink_size"]), "shot": range(first, first + count)}
