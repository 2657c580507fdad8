"""What the pack's own edges carry. All of it is immutable; a node that changes a setting passes on a new value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import NamedTuple

import torch
from comfy_api.latest import Input, io

from ..rolling_kv.checkpoints.model import CausalModel
from ..rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from ..rolling_kv.geometry import Geometry
from ..rolling_kv.sampling.scheduled import Embeds
from ..rolling_kv.sampling.state import CacheState
from ..rolling_kv.schedules.schedule import PromptSchedule
from ..rolling_kv.text import TextEncoder as Umt5
from ..rolling_kv.vae.loading import AnyVAE
from .encoding import Encoder
from .patchers import ManagedModel, ManagedModule

CATEGORY = "RollingKV"

Model = io.Custom("ROLLING_KV_MODEL")  # ModelHandle
TextEncoder = io.Custom("ROLLING_KV_TEXT_ENCODER")  # patchers.ManagedModule around rolling_kv.text.TextEncoder
VAE = io.Custom("ROLLING_KV_VAE")  # patchers.ManagedModule around rolling_kv.vae.loading.AnyVAE
Schedule = io.Custom("ROLLING_KV_SCHEDULE")  # EncodedSchedule
State = io.Custom("ROLLING_KV_STATE")  # rolling_kv.sampling.state.CacheState


class ModelHandle(NamedTuple):
    """A loaded model and the settings to run it with. The weights are shared by every handle of one loader."""

    patcher: ManagedModel
    sampling: SamplingConfig
    cache: CacheConfig
    loras: tuple[tuple[Path, float], ...] = ()  # files and strengths; applied when a sampler runs
    execution: ExecutionConfig = ExecutionConfig()
    step_cache: object | None = None  # a method of rolling_kv.step_cache
    path: Path | None = None  # the file or folder that it was loaded from

    @property
    def engine(self) -> CausalModel:
        return self.patcher.model

    @property
    def geometry(self) -> Geometry:
        return self.engine.geometry

    def __repr__(self) -> str:  # error messages print their inputs
        loras = "".join(f", {path.stem} {strength:g}" for path, strength in self.loras)
        return f"ModelHandle({self.engine.preset.name}, chunk {self.sampling.chunk}, {self.cache}{loras})"


class EncodedSchedule(NamedTuple):
    """A prompt schedule with the embeddings of its prompts.

    origin: where its times count from, one of `ORIGINS`. encoder: the one that made them, for prompts that come while a run goes on.
    """

    schedule: PromptSchedule
    embeds: Embeds
    origin: str
    encoder: Encoder

    def texts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Its texts with their embeddings, for `CacheState.named`."""
        return ((text, made) for text, pair in self.embeds.items() for made in pair if made is not None)

    def __repr__(self) -> str:  # error messages print their inputs
        return f"EncodedSchedule({len(self.schedule.segments)} prompts, from the {self.origin}'s beginning)"


def _holds(engine_type: type | UnionType):
    return lambda value: isinstance(value, ManagedModule) and isinstance(value.model, engine_type)


def _is_conditioning(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, (list, tuple)) and part and isinstance(part[0], torch.Tensor) and part[0].ndim == 3
        for part in value
    )


EDGES = {
    Model.io_type: lambda value: isinstance(value, ModelHandle),
    TextEncoder.io_type: _holds(Umt5),
    io.Clip.io_type: lambda value: hasattr(value, "tokenize") and hasattr(value, "encode_from_tokens_scheduled"),
    VAE.io_type: _holds(AnyVAE),
    Schedule.io_type: lambda value: isinstance(value, EncodedSchedule),
    State.io_type: lambda value: isinstance(value, CacheState),
    io.Conditioning.io_type: _is_conditioning,
    io.Latent.io_type: lambda value: isinstance(value, dict) and isinstance(value.get("samples"), torch.Tensor),
    io.Image.io_type: lambda value: isinstance(value, torch.Tensor) and value.ndim == 4 and 0 not in value.shape,
    io.Video.io_type: lambda value: isinstance(value, Input.Video),
}
"""Whether a value is what an edge of that type carries: ComfyUI lets literals through."""
