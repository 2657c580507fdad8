"""What the pack's own edges carry. All of it is immutable; a node that changes a setting passes on a new value."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from comfy_api.latest import io

from ..rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from .managed import ManagedModel

CATEGORY = "RollingKV"

Model = io.Custom("ROLLING_KV_MODEL")  # ModelHandle
TextEncoder = io.Custom("ROLLING_KV_TEXT_ENCODER")  # managed.ManagedModule around rolling_kv.text.TextEncoder
VAE = io.Custom("ROLLING_KV_VAE")  # managed.ManagedModule around rolling_kv.vae.WanVAE
State = io.Custom("ROLLING_KV_STATE")  # rolling_kv.state.CacheState


class ModelHandle(NamedTuple):
    """A loaded model and the settings to run it with. The weights are shared by every handle of one loader."""

    patcher: ManagedModel
    sampling: SamplingConfig
    cache: CacheConfig
    loras: tuple[tuple[Path, float], ...] = ()  # files and strengths; applied when a sampler runs
    execution: ExecutionConfig = ExecutionConfig()
    step_cache: object | None = None  # a method of rolling_kv.step_cache

    def __repr__(self) -> str:  # error messages print their inputs
        loras = "".join(f", {path.stem} {strength:g}" for path, strength in self.loras)
        return f"ModelHandle({self.patcher.model.preset.name}, chunk {self.sampling.chunk}, {self.cache}{loras})"
