"""One record per model family: its settings, how its files are recognised, where they come from, what it was trained for.

The loader's choices, the detection by file name, the message about a missing file, the table of models in the README and
the notes of the workflows are all made from these records.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace

from .config import CacheConfig, SamplingConfig
from .messages import NAME_LENGTH, listed, shown

_CACHE_FIELDS = tuple(f.name for f in fields(CacheConfig) if f.name not in ("storage", "offload"))
"""What a family was trained with; storage and offload are the user's choice."""


@dataclass(frozen=True)
class ModelFile:
    """A file to download. label: its name as people know it. url: of the file, or of the page that lists it.

    note: what else is to be said of it; may hold a link.
    """

    label: str
    url: str
    note: str = ""


@dataclass(frozen=True)
class ModelPreset:
    """A family of checkpoints.

    name: as users choose it.
    sampling, cache: the settings that the family was trained for.
    title: the family's name and size, for people; families of one title are listed together.
    names: regular expressions of file names, or of `folder/file`, in any case.
    files: where the weights come from.

    Two presets are equal if name and settings are: a model's own JSON holds no more.
    """

    name: str
    sampling: SamplingConfig = SamplingConfig()
    cache: CacheConfig = CacheConfig()
    title: str = field(default="", compare=False)
    names: tuple[str, ...] = field(default=(), compare=False)
    files: tuple[ModelFile, ...] = field(default=(), compare=False)

    def trained_for(self) -> str:
        """The settings as a phrase: `chunks of 3, window 12 with a sink of 3, 4 steps`."""
        sampling, cache = self.sampling, self.cache
        window = "all frames in view" if cache.unlimited else f"window {cache.window}"
        sink = f" with a sink of {cache.sink}" if cache.sink else ""
        guidance = f" with guidance {sampling.guidance_scale:g}" if sampling.guided else ""
        steps = sampling.passes_at(1)
        parts = [f"chunks of {sampling.chunk}", window + sink, f"{steps} step{'s' * (steps != 1)}{guidance}"]
        if sampling.passes_at(0) != sampling.passes_at(1):
            parts.append(f"{sampling.passes_at(0)} for the first chunk")
        return ", ".join(parts)

    def to_dict(self) -> dict:
        """Plain JSON values; `from_dict` reads them back. Names and files are not among them."""
        values = {"name": self.name} | {name: getattr(self.cache, name) for name in _CACHE_FIELDS}
        values |= {f.name: getattr(self.sampling, f.name) for f in fields(SamplingConfig)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> ModelPreset:
        """Read what `to_dict` wrote; absent entries keep their defaults.

        Raises ValueError for unknown entries, and for values that are no settings.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a preset is an object with names and values, not {shown(values)}")
        known = {f.name for f in fields(SamplingConfig)}
        unknown = [name for name in values if name not in known | {"name", *_CACHE_FIELDS}]
        if unknown:
            raise ValueError(f"unknown preset entries: {listed(sorted(unknown))}")
        name = values.get("name", "custom")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= NAME_LENGTH:
            raise ValueError(f"the name of a preset is a text of at most {NAME_LENGTH} characters, got {shown(name)}")
        sampling = SamplingConfig(**{k: v for k, v in values.items() if k in known})
        cache = CacheConfig(**{k: v for k, v in values.items() if k in _CACHE_FIELDS})
        return cls(name, sampling, cache)


_CHUNKWISE = SamplingConfig()
_FRAMEWISE = SamplingConfig(chunk=1)
_HUB = "https://huggingface.co"
_CAUSAL_FORCING = f"{_HUB}/zhuhz22/Causal-Forcing"
_CAUSAL_FORCING_PLUS = ModelFile(
    "framewise-2step.pt, framewise-1step.pt", f"{_CAUSAL_FORCING}/tree/main/causal-forcing%2B%2B"
)
_LONGLIVE_2 = f"{_HUB}/Efficient-Large-Model/LongLive-2.0-5B"
_SHOTS = CacheConfig(32, sink=8, cut_flush=False, cut_offset=8, shot_sink=True)

PRESETS: dict[str, ModelPreset] = {
    preset.name: preset
    for preset in (
        ModelPreset(
            "self-forcing",
            _CHUNKWISE,
            CacheConfig(21),
            title="Self-Forcing, 1.3B",
            names=(r"self.?forcing|sfwan",),
            files=(
                ModelFile(
                    "self_forcing_dmd.pt", f"{_HUB}/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt"
                ),
            ),
        ),
        ModelPreset(
            "causal-forcing-chunkwise",
            _CHUNKWISE,
            CacheConfig(21),
            title="Causal-Forcing, 1.3B",
            names=(r"causal.?forcing.*chunk.?wise|chunk.?wise.*causal.?forcing",),
            files=(
                ModelFile("chunkwise/causal_forcing.pt", f"{_CAUSAL_FORCING}/resolve/main/chunkwise/causal_forcing.pt"),
            ),
        ),
        ModelPreset(
            "causal-forcing-framewise",
            _FRAMEWISE,
            CacheConfig(21),
            title="Causal-Forcing, 1.3B",
            names=(r"causal.?forcing.*frame.?wise|frame.?wise.*causal.?forcing",),
            files=(
                ModelFile("framewise/causal_forcing.pt", f"{_CAUSAL_FORCING}/resolve/main/framewise/causal_forcing.pt"),
            ),
        ),
        ModelPreset(
            "causal-multistep",
            replace(_CHUNKWISE, sampler="unipc", guidance_scale=3.0),
            CacheConfig(21),
            title="Causal-Forcing, 1.3B",
            names=(r"chunk.?wise.*ar.?diffusion",),
            files=(
                ModelFile(
                    "chunkwise/ar_diffusion.pt",
                    f"{_CAUSAL_FORCING}/resolve/main/chunkwise/ar_diffusion.pt",
                    "before its distillation",
                ),
            ),
        ),
        ModelPreset(
            "causal-multistep-framewise",
            replace(_FRAMEWISE, sampler="unipc", guidance_scale=3.0),
            CacheConfig(21),
            title="Causal-Forcing, 1.3B",
            names=(r"frame.?wise.*ar.?diffusion",),
            files=(
                ModelFile(
                    "framewise/ar_diffusion.pt",
                    f"{_CAUSAL_FORCING}/resolve/main/framewise/ar_diffusion.pt",
                    "before its distillation",
                ),
            ),
        ),
        ModelPreset(
            "causal-forcing++-2-step",
            replace(_FRAMEWISE, denoising_steps=(1000, 500), first_chunk_steps=_FRAMEWISE.denoising_steps),
            CacheConfig(21),
            title="Causal-Forcing++, 1.3B",
            names=(r"causal.?forcing.?(\+\+|pp|plus).*2.?step",),
            files=(_CAUSAL_FORCING_PLUS,),
        ),
        ModelPreset(
            "causal-forcing++-1-step",
            replace(_FRAMEWISE, denoising_steps=(1000,), first_chunk_steps=_FRAMEWISE.denoising_steps),
            CacheConfig(21),
            title="Causal-Forcing++, 1.3B",
            names=(r"causal.?forcing.?(\+\+|pp|plus).*1.?step",),
            files=(_CAUSAL_FORCING_PLUS,),
        ),
        ModelPreset(
            "longlive",
            _CHUNKWISE,
            CacheConfig(12, sink=3),
            title="LongLive, 1.3B",
            names=(r"long.?live",),
            files=(
                ModelFile(
                    "longlive_base.pt",
                    f"{_HUB}/Efficient-Large-Model/LongLive-1.3B/resolve/main/models/longlive_base.pt",
                    f"with [lora.pt]({_HUB}/Efficient-Large-Model/LongLive-1.3B/resolve/main/models/lora.pt) in "
                    "`models/loras`",
                ),
            ),
        ),
        ModelPreset(
            "reward-forcing",
            _CHUNKWISE,
            CacheConfig(9, sink=3),
            title="Reward-Forcing, 1.3B",
            names=(r"reward.?forcing",),
            files=(
                ModelFile(
                    "rewardforcing.pt", f"{_HUB}/JaydenLu666/Reward-Forcing-T2V-1.3B/resolve/main/rewardforcing.pt"
                ),
            ),
        ),
        ModelPreset(
            "krea-realtime",
            _CHUNKWISE,
            CacheConfig(6),
            title="Krea Realtime, 14B",
            names=(r"krea.?real.?time",),
            files=(
                ModelFile(
                    "krea-realtime-video-14b.safetensors",
                    f"{_HUB}/krea/krea-realtime-video/resolve/main/krea-realtime-video-14b.safetensors",
                ),
            ),
        ),
        ModelPreset(
            "longlive2",
            SamplingConfig(chunk=8, sampler="unipc", num_inference_steps=4),
            _SHOTS,
            title="LongLive 2, 5B",
            names=(r"long.?live.?2(?!\d)",),
            files=(
                ModelFile(
                    "model_bf16.pt",
                    f"{_LONGLIVE_2}/resolve/main/model_bf16.pt",
                    "in a folder called `LongLive-2.0-5B`; its LoRA is merged already",
                ),
            ),
        ),
        ModelPreset(
            "longlive2-2-step",
            SamplingConfig(chunk=8, sampler="unipc", num_inference_steps=2),
            _SHOTS,
            title="LongLive 2, 5B",
            names=(r"long.?live.?2(?!\d).*([^a-z\d]s2(?![a-z\d])|2.?step)",),
            files=(
                ModelFile(
                    "model_te.pt",
                    f"{_LONGLIVE_2}-NVFP4-S2/resolve/main/model_te.pt",
                    "in a folder called `LongLive-2.0-5B-NVFP4-S2`; bfloat16 weights that were trained for NVFP4",
                ),
            ),
        ),
    )
}
"""Presets by name, from the published settings of each family. A family stands below those whose names it contains."""

DEFAULT_PRESET = PRESETS["self-forcing"]
DEFAULT_PRESETS = {16: DEFAULT_PRESET, 48: PRESETS["longlive2"]}
"""What is assumed of a checkpoint that does not tell, by its latent channels."""

_REPACKAGED = f"{_HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
TEXT_ENCODER_FILES = tuple(
    ModelFile(name, f"{_REPACKAGED}/text_encoders/{name}")
    for name in ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "umt5_xxl_fp16.safetensors")
)
VAE_FILE = ModelFile("wan_2.1_vae.safetensors", f"{_REPACKAGED}/vae/wan_2.1_vae.safetensors")
"""What every family reads prompts and writes pictures with."""

CAUSAL_MARK_PRESET = PRESETS["causal-forcing-framewise"]
"""Of files that carry ComfyUI's mark for causal models: the one family that it has repackaged."""


def preset_for_name(name: str) -> ModelPreset | None:
    """The preset of a family whose files are called so: `name` is a file name, or `folder/file`; None for no known one."""
    for preset in reversed(PRESETS.values()):
        if any(re.search(pattern, name, re.IGNORECASE) for pattern in preset.names):
            return preset
    return None
