"""What a recorded case is, whatever its family: its tensors, the model, one run of the engine, and what is compared."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from safetensors import safe_open

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession

from .slots import Slots, read_slots


class Prompt(NamedTuple):
    """What a chunk is asked for: embeddings [B, L, D], the switch that it begins with (None: the family's own way), and
    the chunks over which it is blended in."""

    embeds: torch.Tensor
    switch: str | None = None
    blend: int = 1


class Made(NamedTuple):
    """What the engine made of a case: the clean latents, [B, F, C, H, W], and each layer's slots at the end."""

    output: torch.Tensor
    slots: list[Slots]


def read_config(path: Path) -> dict:
    """The settings of the recording in a file. The first recordings, of Self-Forcing, do not name their family."""
    with safe_open(path, framework="pt") as file:
        return {"family": "self-forcing"} | json.loads(file.metadata()["config"])


@dataclass(frozen=True)
class Case:
    """One file: the tensors are in the original's order of axes, [B, F, C, H, W].

    A family says in its subclass what its settings mean to the engine, and which slots of the cache it recorded.
    """

    path: Path
    config: dict
    bfloat16_allowance: ClassVar[float] = 1.0
    """How much larger than the recording's own the mean error in bfloat16 may be."""

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.path)

    @property
    def family(self) -> str:
        return self.config["family"]

    @property
    def name(self) -> str:
        return f"{self.family}/{self.path.stem}"

    @property
    def dtype(self) -> str:
        return self.config["dtype"]

    @property
    def quirk(self) -> bool:
        """Whether the case shows a fault of the original, which the engine does not share."""
        return self.config.get("quirk", False)

    @property
    def chunk(self) -> int:
        return self.config["num_frame_per_block"]

    @property
    def given(self) -> int:
        """Latent frames that the video goes on from."""
        return self.config.get("num_initial", 0)

    @property
    def total(self) -> int:
        """Latent frames of the output."""
        return self.tensors["output"].shape[1]

    def sampling(self) -> SamplingConfig:
        config = self.config
        return SamplingConfig(
            chunk=self.chunk,
            independent_first_frame=config["independent_first_frame"],
            denoising_steps=tuple(config["denoising_step_list"]),
            shift=config["timestep_shift"],
            context_noise=config["context_noise"],
        )

    def cache(self) -> CacheConfig:
        return CacheConfig(self.window, self.config["sink_size"], positions=self.config.get("rope", "absolute"))

    @property
    def window(self):
        return ALL_FRAMES if self.config["local_attn_size"] == -1 else self.config["local_attn_size"]

    def starts(self) -> list[int]:
        """The first latent frame of every chunk that is generated."""
        starts, sampling = [], self.sampling()
        frame = self.given
        while frame < self.total:
            starts.append(frame)
            frame += sampling.chunk_size(frame)
        return starts

    def prompts(self) -> dict[int, Prompt]:
        """The prompt from each latent frame on where it changes."""
        return {0: Prompt(self.tensors["prompt_embeds.0"])}

    def first_prompt(self) -> torch.Tensor:
        """Embeddings of the prompt that the session is opened with, [B, L, D]."""
        return self.prompts()[0].embeds

    def noise(self, start: int, draw: int, shape: tuple) -> torch.Tensor:
        """A `NoiseSource`: the recorded draws."""
        if draw == 0:
            begin = start - self.given
            recorded = self.tensors["noise"][:, begin : begin + shape[2]]
        else:
            recorded = self.tensors[f"renoise.{self.starts().index(start)}.{draw - 1}"]
        return recorded.transpose(1, 2)

    def give(self, session: RollingSession) -> None:
        """Hand over the frames that the video goes on from, or begins with."""
        if "initial_latent" in self.tensors:
            session.prefill(self.tensors["initial_latent"].transpose(1, 2))

    def model(self, dtype: torch.dtype) -> CausalModel:
        heads = self.config["num_heads"]
        transformer = build_transformer(
            read_tensors(self.path.parent / self.config["weights"]),
            dict(num_attention_heads=heads, attention_head_dim=self.config["dim"] // heads),
            dtype=dtype,
        )
        return CausalModel(transformer, ModelPreset("case", self.sampling(), self.cache()))

    def make(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        exact: bool,
        device: str = "cpu",
        execution: ExecutionConfig | None = None,
    ) -> Made:
        """Everything the engine makes of the case, and where its cache stands then.

        execution: in the place of what `exact` says.
        """
        model, prompts = self.model(dtype).to(device), self.prompts()
        height, width = model.geometry.pixel_size(self.config["height"], self.config["width"])
        session = RollingSession(
            model,
            self.first_prompt(),
            negative=self.negative(),
            height=height,
            width=width,
            batch=self.config["batch"],
            execution=execution or ExecutionConfig(exact=exact),
            vae=self.vae(),
        )
        starts = self.starts()
        with session:
            self.give(session)
            self.ask(session, prompts.get(starts[0]))
            for _ in session.generate(len(starts), noise_source=self.noise, source=self.source()):
                self.ask(session, prompts.get(session.state.frames))
            return Made(session.state.latents().transpose(1, 2), read_slots(session) if self.slots() else [])

    def ask(self, session: RollingSession, prompt: Prompt | None) -> None:
        """Make the next chunk with another prompt, if there is one."""
        if prompt is not None:
            session.set_prompt(prompt.embeds, self.negative(), prompt.switch, blend=prompt.blend)

    def vae(self):
        """What the session decodes and encodes frames with; None where it needs nothing."""
        return None

    def source(self) -> torch.Tensor | None:
        """Latents of a video that the frames begin as, [B, C, F, H, W]; None where they begin as noise."""
        return None

    def slots(self) -> dict[str, range]:
        """Which slots of every layer were recorded, by the name of the recording."""
        return {}

    def recorded(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """What was recorded of some slots, in the shape of ours."""
        return self.tensors[name].view_as(like)

    def held(self, made: Made) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Our slots and the recorded ones, by the name of the recording."""
        held = {}
        for name, which in self.slots().items():
            for layer, slots in enumerate(made.slots):
                if f"{name}_k.{layer}" in self.tensors:
                    for kind, ours in (("k", slots.keys[:, which]), ("v", slots.values[:, which])):
                        key = f"{name}_{kind}.{layer}"
                        held[key] = ours, self.recorded(key, ours)
        return held

    def negative(self) -> torch.Tensor | None:
        """Embeddings of the negative prompt, [B or 1, L, D]; None without guidance."""
        return self.tensors.get("negative_prompt_embeds")

    def run(self, *, exact: bool, **options) -> torch.Tensor:
        """The clean latents that the engine makes of the case, [B, F, C, H, W]. options: see `make`."""
        return self.make(exact=exact, **options).output


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}
