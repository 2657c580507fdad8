"""What all jobs of a batch share: the model and how it is run, as a frozen value that goes to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..bundled import BUNDLED
from ..config import CacheConfig, ExecutionConfig, SamplingConfig, check_choice
from ..inspection import inspect_checkpoint
from ..pipeline import Pipeline
from ..presets import PRESETS, ModelPreset
from ..video import ENCODERS, PLAIN
from .jobs import check_size
from .texts import KnownTexts


@dataclass(frozen=True)
class Settings:
    """The model of a batch and how it is run; see `Pipeline.load` and `Pipeline.generate`.

    model, text_encoder, vae: files or folders, which every machine that works has under this name.
    preset, dtype, storage, loras, offload, device: of `Pipeline.load`.
    rules: cache settings that differ from the preset's, by their names in `CacheConfig`.
    guidance: scale of classifier-free guidance; None: the preset's.
    execution: how passes are computed.
    width, height: pixels, where a job has none of its own; None: the model's usual size.
    scale: enlarge each pixel so many times.
    encoder: of the video, see `VideoWriter`.
    """

    model: str = str(BUNDLED)
    text_encoder: str | None = None
    vae: str | None = None
    preset: str = "auto"
    dtype: str = "auto"
    storage: str = "model"
    loras: tuple[tuple[str, float], ...] = ()
    offload: bool = False
    device: str = "cpu"
    rules: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    execution: ExecutionConfig = ExecutionConfig()
    width: int | None = None
    height: int | None = None
    scale: int = 1
    encoder: str = PLAIN

    def load(self, texts: KnownTexts | None = None) -> Pipeline:
        """The model with its parts. texts: prompts that are encoded already, in the place of the text encoder."""
        return Pipeline.load(
            Path(self.model),
            text_encoder=self.text_encoder if texts is None else texts,
            vae=self.vae,
            preset=self.preset,
            dtype=self.dtype,
            storage=self.storage,
            loras=self.loras,
            offload=self.offload,
            device=self.device,
        )

    def preset_of_model(self) -> ModelPreset:
        """The model's preset, told without loading it. Raises CheckpointError for files that are none."""
        return PRESETS.get(self.preset) or inspect_checkpoint(self.model).settings

    def check(self) -> None:
        """Raise ValueError for settings that do not go together, before anything is loaded."""
        check_choice("the encoder", self.encoder, ENCODERS)
        check_size(self.width, self.height)
        preset = self.preset_of_model()
        self.sampling(preset).check_cache(self.cache(preset))
        self.execution.check(self.device, weight_storage=self.storage)
        if self.offload:
            self.execution.check_offloaded()

    def cache(self, preset: ModelPreset) -> CacheConfig:
        return preset.cache.with_rules(**self.rules)

    def sampling(self, preset: ModelPreset) -> SamplingConfig:
        return preset.sampling if self.guidance is None else replace(preset.sampling, guidance_scale=self.guidance)

    def deciding(self) -> dict[str, Any]:
        """What of it decides how a video looks, as JSON has it; where it is computed and what encodes it do not."""
        elsewhere = ("device", "execution", "offload", "encoder")
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}
