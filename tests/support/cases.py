"""The recorded cases of the original implementation: reading them, and running them through the engine."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from reference import NaiveRun
from safetensors import safe_open

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession

FOLDER = Path(os.environ.get("ROLLING_KV_CASES", Path(__file__).parents[1] / "data" / "self_forcing"))


@dataclass
class Case:
    """One file: the tensors are in the original's order of axes, [B, F, C, H, W]."""

    name: str
    config: dict
    tensors: dict

    @classmethod
    def load(cls, path: Path) -> "Case":
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            return cls(path.stem, config, {key: file.get_tensor(key) for key in file.keys()})

    @property
    def frames_stay(self) -> bool:
        """No frame ever leaves the window."""
        window = self.config["local_attn_size"]
        return window == -1 or self.config["num_initial"] + self.config["num_frames"] <= window

    def model(self, dtype: torch.dtype) -> CausalModel:
        config = self.config
        with safe_open(FOLDER / config["weights"], framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}
        transformer = build_transformer(
            weights,
            dict(num_attention_heads=config["num_heads"], attention_head_dim=config["dim"] // config["num_heads"]),
            dtype=dtype,
        )
        sampling = SamplingConfig(
            chunk=config["num_frame_per_block"],
            independent_first_frame=config["independent_first_frame"],
            sampler=config["sampler"],
            denoising_steps=tuple(config["denoising_step_list"]),
            num_inference_steps=config["num_inference_steps"],
            shift=config["timestep_shift"],
            guidance_scale=config["guidance_scale"],
            context_noise=config["context_noise"],
        )
        window = ALL_FRAMES if config["local_attn_size"] == -1 else config["local_attn_size"]
        cache = CacheConfig(window, config["sink_size"])
        return CausalModel(transformer, ModelPreset("case", sampling, cache))

    def noise(self, start: int, draw: int, shape: tuple) -> torch.Tensor:
        """A `NoiseSource`: the recorded draws."""
        begin = start - self.config["num_initial"]
        if draw == 0:
            recorded = self.tensors["noise"][:, begin : begin + shape[2]]
        else:
            first = self.config["independent_first_frame"] and not self.config["num_initial"]
            chunk = (
                -(-begin // self.config["num_frame_per_block"])
                if first
                else begin // self.config["num_frame_per_block"]
            )
            recorded = self.tensors[f"renoise.{chunk}.{draw - 1}"]
        return recorded.transpose(1, 2)

    def run(self, *, dtype: torch.dtype = torch.float32, exact: bool) -> torch.Tensor:
        """Everything the engine makes of the case, [B, F, C, H, W]."""
        model = self.model(dtype)
        tensors = {key: value.to(dtype) for key, value in self.tensors.items()}
        session = RollingSession(
            model,
            tensors["prompt_embeds"],
            negative=tensors.get("negative_prompt_embeds"),
            height=self.config["height"] * 8,
            width=self.config["width"] * 8,
            batch=self.config["batch"],
            execution=ExecutionConfig(exact=exact),
        )
        with session:
            if self.config["num_initial"]:
                session.prefill(tensors["initial_latent"].transpose(1, 2))
            frames = self.config["num_frames"]
            while frames > 0:
                for chunk in session.generate(1, noise_source=self.noise):
                    frames -= chunk.latents.shape[2]
        return session.state.latents().transpose(1, 2)

    def run_naively(self) -> torch.Tensor:
        """What the naive reference makes of a few-step case at batch 1, [B, F, C, H, W]."""
        model = self.model(torch.float32)
        reference = NaiveRun(model, self.tensors["prompt_embeds"])
        made = []
        if self.config["num_initial"]:
            made.append(self.tensors["initial_latent"].transpose(1, 2))
            reference.prefill(made[0])
        while reference.start < self.config["num_initial"] + self.config["num_frames"]:
            start = reference.start
            shape = (1, 16, model.preset.sampling.chunk_size(start), self.config["height"], self.config["width"])
            made.append(reference.chunk(lambda draw: self.noise(start, draw, shape)))
        return torch.cat(made, dim=2).transpose(1, 2)


def load_cases(sampler: str) -> list[Case]:
    """Every recorded case of a sampler ("renoise" or "unipc")."""
    paths = sorted(path for path in FOLDER.glob("*.safetensors") if not path.stem.startswith("weights"))
    return [case for case in map(Case.load, paths) if case.config["sampler"] == sampler]
