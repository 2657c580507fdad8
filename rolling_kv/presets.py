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
    names: regular expressions of file names, or of `folder/file` and `folder/folder/file`, in any case. None: what is
        trained for this is told by nobody but the user.
    files: where the weights come from.
    cut_marker: what a prompt begins with that cuts to a new shot; empty where no text does.
    licence: of the weights, and who says so.
    source: the code or paper that the settings were read from.
    compared: the family of recordings that the rules were compared with, see docs/models.md; empty for none.
    note: what is not as in the family's own code, as a sentence; empty where there is nothing to say.

    Two presets are equal if name and settings are: a model's own JSON holds no more.
    """

    name: str
    sampling: SamplingConfig = SamplingConfig()
    cache: CacheConfig = CacheConfig()
    cut_marker: str = ""
    title: str = field(default="", compare=False)
    names: tuple[str, ...] = field(default=(), compare=False)
    files: tuple[ModelFile, ...] = field(default=(), compare=False)
    licence: str = field(default="", compare=False)
    source: str = field(default="", compare=False)
    compared: str = field(default="", compare=False)
    note: str = field(default="", compare=False)

    def trained_for(self) -> str:
        """The settings as a phrase: `chunks of 3, window 12 with a sink of 3, window computed anew at a switch, 4 steps`."""
        sampling, cache = self.sampling, self.cache
        window = "all frames in view" if cache.unlimited else f"window {cache.window}"
        sink = f" with a sink of {cache.sink}" if cache.sink else ""
        guidance = f" with guidance {sampling.guidance_scale:g}" if sampling.guided else ""
        steps = sampling.passes
        return ", ".join(
            [
                f"chunks of {sampling.chunk}",
                window + sink,
                *self.rules(),
                f"{steps} step{'s' * (steps != 1)}{' of as many chunks at once' * sampling.joint}{guidance}",
                *_first_chunks(sampling),
                *([f"shift {sampling.shift:g}"] * (sampling.shift != SamplingConfig.shift)),
            ]
        )

    def rules(self) -> list[str]:
        """What the cache does beside keeping a window, as phrases."""
        cache = self.cache
        span = f" that end at {cache.span}" if cache.span else ""
        said = [f"positions in the window{span}"] if cache.positions == "window" else []
        if cache.leaving == "ema":
            said.append("what leaves averaged into the sink")
        elif cache.leaving == "memory":
            said.append("what leaves averaged into 2 memory frames")
        if cache.shot_sink:
            said.append("a sink for every shot too")
        if cache.context == "recomputed":
            said.append("recomputed before every chunk")
        if cache.switch in ("joint", "causal"):
            how = " chunk by chunk" if cache.switch == "causal" else ""
            sink = " and a new sink" if cache.sink and not cache.global_sink else ""
            said.append(f"window computed anew{how} at a switch{sink}")
        elif cache.switch != "hold":
            said.append(f"{cache.switch} at a switch")
        return said

    def to_dict(self) -> dict:
        """Plain JSON values; `from_dict` reads them back. Names and files are not among them."""
        values = {"name": self.name} | {name: getattr(self.cache, name) for name in _CACHE_FIELDS}
        values |= {f.name: getattr(self.sampling, f.name) for f in fields(SamplingConfig)}
        values |= {"cut_marker": self.cut_marker} if self.cut_marker else {}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> ModelPreset:
        """Read what `to_dict` wrote; absent entries keep their defaults.

        Raises ValueError for unknown entries, for values that are no settings, and for a chunk that the cache's rules
        do not fit.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a preset is an object with names and values, not {shown(values)}")
        known = {f.name for f in fields(SamplingConfig)}
        unknown = [name for name in values if name not in known | {"name", "cut_marker", *_CACHE_FIELDS}]
        if unknown:
            raise ValueError(f"unknown preset entries: {listed(sorted(unknown))}")
        name, marker = values.get("name", "custom"), values.get("cut_marker", "")
        for what, text, least in (("name", name, 1), ("cut marker", marker, 0)):
            if not isinstance(text, str) or not text.isprintable() or not least <= len(text) <= NAME_LENGTH:
                raise ValueError(
                    f"the {what} of a preset is a text of at most {NAME_LENGTH} characters, got {shown(text)}"
                )
        sampling = SamplingConfig(**{k: v for k, v in values.items() if k in known})
        cache = CacheConfig(**{k: v for k, v in values.items() if k in _CACHE_FIELDS})
        sampling.check_cache(cache)
        return cls(name, sampling, cache, marker)


def _first_chunks(sampling: SamplingConfig) -> list[str]:
    first = sampling.first_passes
    return [f"{' and '.join(map(str, first))} for the first chunk{'s' * (len(first) > 1)}"] if first else []


_CHUNKWISE = SamplingConfig()
_FRAMEWISE = SamplingConfig(chunk=1)
_HUB = "https://huggingface.co"
_GITHUB = "https://github.com"
_APACHE = "Apache-2.0"
_CAUSAL_FORCING = f"{_HUB}/zhuhz22/Causal-Forcing"
_CAUSAL_FORCING_CODE = f"{_GITHUB}/thu-ml/Causal-Forcing"
_CAUSAL_FORCING_PLUS = ModelFile(
    "framewise-2step.pt, framewise-1step.pt", f"{_CAUSAL_FORCING}/tree/main/causal-forcing%2B%2B"
)
_SELF_FORCING = ModelFile(
    "self_forcing_dmd.pt", f"{_HUB}/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt"
)
_SELF_FORCING_LICENCE = "CC BY-NC-SA 4.0 (model card)"
_LONGLIVE = f"{_HUB}/Efficient-Large-Model/LongLive-1.3B/resolve/main/models"
_LONGLIVE_BASE = ModelFile(
    "longlive_base.pt", f"{_LONGLIVE}/longlive_base.pt", f"with [lora.pt]({_LONGLIVE}/lora.pt) in `models/loras`"
)
_LONGLIVE_LICENCE = f"{_APACHE} (its repository)"
_LONGLIVE_CODE = f"{_GITHUB}/NVlabs/LongLive/tree/v1.0"
_LONGLIVE_CACHE = CacheConfig(12, sink=3, switch="joint")
_ROLLING_CACHE = CacheConfig(21, sink=3)
_OPSD_V = f"{_HUB}/MeiGen-AI/OPSD-V/resolve/main/checkpoints"
_OPSD_V_CODE = f"{_GITHUB}/MeiGen-AI/OPSD-V"
_OPSD_V_LICENCE = f"{_APACHE} for the code; the LoRA's is not stated, the base keeps its own"
_SGF = f"{_HUB}/JunhaoZhuang/Self_Gradient_Forcing/resolve/main"
_SGF_CODE = f"{_GITHUB}/zhuang2002/Self_Gradient_Forcing"
_SGF_PLUS = f"{_HUB}/ZihanSu/Self_Gradient_Forcing_Plus/resolve/main"
_SGF_PLUS_CODE = f"{_GITHUB}/Zihan-Su/Self_Gradient_Forcing_Plus"
_SGF_LICENCE = f"{_APACHE} (its repository)"
_SGF_NAME = r"(self.?gradient.?forcing|(^|[/_.-])sgf)"
_SGF_PLUS_NOTE = "A second set of weights makes the context passes, and takes as much memory as the first."
_SGF_PLUS_NAME = rf"{_SGF_NAME}.?(\+|plus)"
_LONGLIVE_2_CODE = f"{_GITHUB}/NVlabs/LongLive"
_LONGLIVE_2 = f"{_HUB}/Efficient-Large-Model/LongLive-2.0-5B"
_UNIPC = SamplingConfig(chunk=8, sampler="unipc", num_inference_steps=4, given_frame="in chunk")
_SHOT_MARKER = "The scene transitions. "
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
            files=(_SELF_FORCING,),
            licence=_SELF_FORCING_LICENCE,
            source=f"{_GITHUB}/guandeh17/Self-Forcing",
            compared="self-forcing",
        ),
        ModelPreset(
            "deep-sink",
            _CHUNKWISE,
            CacheConfig(21, sink=10, positions="window"),
            title="Self-Forcing, 1.3B",
            files=(_SELF_FORCING,),
            licence=_SELF_FORCING_LICENCE,
            source="https://arxiv.org/abs/2512.05081",
            compared="longlive",
            note="For long videos, without training: Deep Forcing's deep sink. Its pruning of single tokens is not built.",
        ),
        ModelPreset(
            "memrope",
            _CHUNKWISE,
            CacheConfig(12, sink=3, positions="window", leaving="memory"),
            title="Self-Forcing, 1.3B",
            files=(_SELF_FORCING,),
            licence=_SELF_FORCING_LICENCE,
            source=f"{_GITHUB}/YoungRaeKimm/MemRoPE",
            compared="memrope",
            note="For long videos, without training. The averages are kept in float32, where the original's bfloat16 stalls.",
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
            licence=f"{_APACHE} (model card)",
            source=_CAUSAL_FORCING_CODE,
            compared="self-forcing",
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
            licence=f"{_APACHE} (model card)",
            source=_CAUSAL_FORCING_CODE,
            compared="self-forcing",
        ),
        ModelPreset(
            "causal-forcing-long",
            replace(_CHUNKWISE, sampler="rolling"),
            _ROLLING_CACHE,
            title="Causal-Forcing, 1.3B",
            names=(r"chunk.?wise/long.?video|causal.?forcing.*long.?video",),
            files=(ModelFile("chunkwise/longvideo.pt", f"{_CAUSAL_FORCING}/resolve/main/chunkwise/longvideo.pt"),),
            licence=f"{_APACHE} (model card)",
            source=_CAUSAL_FORCING_CODE,
            compared="rolling-forcing",
            note="Rolling-Forcing's sampler, with four steps.",
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
            licence=f"{_APACHE} (model card)",
            source=_CAUSAL_FORCING_CODE,
            compared="self-forcing",
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
            licence=f"{_APACHE} (model card)",
            source=_CAUSAL_FORCING_CODE,
            compared="self-forcing",
        ),
        ModelPreset(
            "causal-forcing++-2-step",
            replace(_FRAMEWISE, denoising_steps=(1000, 500), first_chunk_steps=_FRAMEWISE.denoising_steps),
            CacheConfig(21),
            title="Causal-Forcing++, 1.3B",
            names=(r"causal.?forcing.?(\+\+|pp|plus).*2.?step",),
            files=(_CAUSAL_FORCING_PLUS,),
            licence=f"{_APACHE} (model card)",
            source=_CAUSAL_FORCING_CODE,
            compared="self-forcing",
        ),
        ModelPreset(
            "causal-forcing++-1-step",
            replace(_FRAMEWISE, denoising_steps=(1000,), first_chunk_steps=_FRAMEWISE.denoising_steps),
            CacheConfig(21),
            title="Causal-Forcing++, 1.3B",
            names=(r"causal.?forcing.?(\+\+|pp|plus).*1.?step",),
            files=(_CAUSAL_FORCING_PLUS,),
            licence=f"{_APACHE} (model card)",
            source=_CAUSAL_FORCING_CODE,
            compared="self-forcing",
        ),
        ModelPreset(
            "longlive",
            _CHUNKWISE,
            _LONGLIVE_CACHE,
            title="LongLive, 1.3B",
            names=(r"long.?live",),
            files=(_LONGLIVE_BASE,),
            licence=_LONGLIVE_LICENCE,
            source=_LONGLIVE_CODE,
            compared="longlive",
        ),
        ModelPreset(
            "longlive-infinity",
            _CHUNKWISE,
            replace(_LONGLIVE_CACHE, positions="window"),
            title="LongLive, 1.3B",
            files=(_LONGLIVE_BASE,),
            licence=_LONGLIVE_LICENCE,
            source=_LONGLIVE_CODE,
            compared="longlive",
            note="For videos of more than half a minute; the same files.",
        ),
        ModelPreset(
            "diagdistill",
            replace(
                _CHUNKWISE,
                denoising_steps=(1000, 100),
                first_chunk_steps=((1000, 736, 354, 100), (1000, 736, 100)),
            ),
            _LONGLIVE_CACHE,
            title="DiagDistill, 1.3B",
            names=(r"dia(g|gonal)?.?distill",),
            files=(_LONGLIVE_BASE,),
            licence=f"{_APACHE} for the code; no weights of its own were found, its settings name LongLive's",
            source=f"{_GITHUB}/Sphere-AI-Lab/diagdistill",
            note="Its own code keeps the keys of the last, noisy step; here every chunk has its context pass. Steps to half "
            "a timestep.",
        ),
        ModelPreset(
            "memflow",
            _CHUNKWISE,
            _LONGLIVE_CACHE,
            title="MemFlow, 1.3B",
            names=(r"mem.?flow",),
            files=(
                ModelFile(
                    "base.pt",
                    f"{_HUB}/KlingTeam/MemFlow/resolve/main/base.pt",
                    f"with [lora.pt]({_HUB}/KlingTeam/MemFlow/resolve/main/lora.pt) in `models/loras`",
                ),
            ),
            licence=f"{_APACHE} for the code; its model card names none",
            source=f"{_GITHUB}/KlingTeam/MemFlow",
            note="Without its memory bank, which chooses 3 frames of the past by the prompt: as LongLive.",
        ),
        ModelPreset(
            "reward-forcing",
            _CHUNKWISE,
            CacheConfig(9, sink=3, positions="window", leaving="ema", ema_alpha=0.999),
            title="Reward-Forcing, 1.3B",
            names=(r"reward.?forcing",),
            files=(
                ModelFile(
                    "rewardforcing.pt", f"{_HUB}/JaydenLu666/Reward-Forcing-T2V-1.3B/resolve/main/rewardforcing.pt"
                ),
            ),
            licence=f"{_APACHE} for the code; its model card names none",
            source=f"{_GITHUB}/JaydenLyh/Reward-Forcing",
            compared="reward-forcing",
            note="The average is kept in float32, where the original's bfloat16 loses it to rounding.",
        ),
        ModelPreset(
            "rolling-forcing",
            replace(_CHUNKWISE, sampler="rolling", denoising_steps=(1000, 800, 600, 400, 200)),
            _ROLLING_CACHE,
            title="Rolling-Forcing, 1.3B",
            names=(r"rolling.?forcing",),
            files=(
                ModelFile(
                    "rolling_forcing_dmd.pt",
                    f"{_HUB}/TencentARC/RollingForcing/resolve/main/checkpoints/rolling_forcing_dmd.pt",
                ),
            ),
            licence="academic use only (its repository), where the model card says MIT",
            source=f"{_GITHUB}/TencentARC/RollingForcing",
            compared="rolling-forcing",
        ),
        ModelPreset(
            "krea-realtime",
            replace(_CHUNKWISE, denoising_steps=(1000, 750, 500, 250, 0)),
            CacheConfig(6, positions="window", context="recomputed"),
            title="Krea Realtime, 14B",
            names=(r"krea.?real.?time",),
            files=(
                ModelFile(
                    "krea-realtime-video-14b.safetensors",
                    f"{_HUB}/krea/krea-realtime-video/resolve/main/krea-realtime-video-14b.safetensors",
                ),
            ),
            licence="CC BY-NC-SA 4.0 (its repository)",
            source=f"{_GITHUB}/krea-ai/realtime-video",
            compared="krea",
        ),
        ModelPreset(
            "shotstream",
            replace(_CHUNKWISE, denoising_steps=(1000, 740, 500, 260), shift=8.0),
            CacheConfig(21),
            title="ShotStream, 1.3B",
            names=(r"shot.?stream",),
            files=(
                ModelFile("shotstream_merged.pt", f"{_HUB}/KlingTeam/ShotStream/resolve/main/shotstream_merged.pt"),
            ),
            licence=f"{_APACHE} (model card)",
            source=f"{_GITHUB}/KlingAIResearch/ShotStream",
            note="One shot, of up to 21 latent frames: the 6 frames of earlier shots that its own code gives as context, "
            "nothing but zeros in the first shot, are not given here.",
        ),
        ModelPreset(
            "self-gradient-forcing-chunkwise",
            _CHUNKWISE,
            CacheConfig(12, sink=3, positions="window", span=21),
            title="Self Gradient Forcing, 1.3B",
            names=(_SGF_NAME, r"chunk.?wise/ar/model\."),
            files=(ModelFile("chunkwise/ar/model.pt", f"{_SGF}/chunkwise/ar/model.pt"),),
            licence=_SGF_LICENCE,
            source=_SGF_CODE,
            compared="self-gradient-forcing",
        ),
        ModelPreset(
            "self-gradient-forcing-framewise",
            _FRAMEWISE,
            CacheConfig(21, sink=4, positions="window"),
            title="Self Gradient Forcing, 1.3B",
            names=(rf"{_SGF_NAME}.*frame.?wise|frame.?wise.*{_SGF_NAME}", r"frame.?wise/ar/model\."),
            files=(ModelFile("framewise/ar/model.pt", f"{_SGF}/framewise/ar/model.pt"),),
            licence=_SGF_LICENCE,
            source=_SGF_CODE,
            compared="self-gradient-forcing",
        ),
        ModelPreset(
            "self-gradient-forcing-plus-chunkwise",
            _CHUNKWISE,
            CacheConfig(12, sink=3, positions="window"),
            title="Self Gradient Forcing Plus, 1.3B",
            names=(_SGF_PLUS_NAME,),
            files=(ModelFile("chunkwise/model.pt", f"{_SGF_PLUS}/chunkwise/model.pt"),),
            licence=_SGF_LICENCE,
            source=_SGF_PLUS_CODE,
            compared="self-gradient-forcing",
            note=_SGF_PLUS_NOTE,
        ),
        ModelPreset(
            "self-gradient-forcing-plus-framewise",
            _FRAMEWISE,
            CacheConfig(21, sink=4, positions="window"),
            title="Self Gradient Forcing Plus, 1.3B",
            names=(rf"{_SGF_PLUS_NAME}.*frame.?wise|frame.?wise.*{_SGF_PLUS_NAME}",),
            files=(ModelFile("framewise/model.pt", f"{_SGF_PLUS}/framewise/model.pt"),),
            licence=_SGF_LICENCE,
            source=_SGF_PLUS_CODE,
            compared="self-gradient-forcing",
            note=_SGF_PLUS_NOTE,
        ),
        ModelPreset(
            "opsd-v-self-forcing",
            _CHUNKWISE,
            CacheConfig(12, sink=3, positions="window"),
            title="OPSD-V, 1.3B",
            names=(r"opsd.?v.*self.?forcing",),
            files=(
                ModelFile(
                    "self_forcing_dmd.pt",
                    _SELF_FORCING.url,
                    f"with [opsdv_self_forcing_lora.pt]({_OPSD_V}/opsdv_self_forcing_lora.pt) in `models/loras`",
                ),
            ),
            licence=_OPSD_V_LICENCE,
            source=_OPSD_V_CODE,
            compared="longlive",
            note="To be chosen by hand: the model's name is that of its base.",
        ),
        ModelPreset(
            "opsd-v-longlive",
            _CHUNKWISE,
            replace(_LONGLIVE_CACHE, positions="window"),
            title="OPSD-V, 1.3B",
            names=(r"opsd.?v.*long.?live",),
            files=(
                ModelFile(
                    "longlive_base.pt",
                    _LONGLIVE_BASE.url,
                    f"with [opsdv_longlive_lora.pt]({_OPSD_V}/opsdv_longlive_lora.pt) in `models/loras`, instead of its own",
                ),
            ),
            licence=_OPSD_V_LICENCE,
            source=_OPSD_V_CODE,
            compared="longlive",
            note="To be chosen by hand: the model's name is that of its base.",
        ),
        ModelPreset(
            "longlive2",
            _UNIPC,
            _SHOTS,
            _SHOT_MARKER,
            title="LongLive 2, 5B",
            names=(r"long.?live.?2(?!\d)",),
            files=(
                ModelFile(
                    "model_bf16.pt",
                    f"{_LONGLIVE_2}/resolve/main/model_bf16.pt",
                    "in a folder called `LongLive-2.0-5B`; its LoRA is merged already",
                ),
            ),
            licence=_LONGLIVE_LICENCE,
            source=_LONGLIVE_2_CODE,
            compared="longlive2",
        ),
        ModelPreset(
            "longlive2-2-step",
            replace(_UNIPC, num_inference_steps=2),
            _SHOTS,
            _SHOT_MARKER,
            title="LongLive 2, 5B",
            names=(r"long.?live.?2(?!\d).*([^a-z\d]s2(?![a-z\d])|2.?step)",),
            files=(
                ModelFile(
                    "model_te.pt",
                    f"{_LONGLIVE_2}-NVFP4-S2/resolve/main/model_te.pt",
                    "in a folder called `LongLive-2.0-5B-NVFP4-S2`; bfloat16 weights that were trained for NVFP4",
                ),
            ),
            licence=_LONGLIVE_LICENCE,
            source=_LONGLIVE_2_CODE,
            compared="longlive2",
        ),
    )
}
"""Presets by name, from the published settings of each family. A family stands below those whose names it contains."""

DEFAULT_PRESET = PRESETS["self-forcing"]
DEFAULT_PRESETS = {16: DEFAULT_PRESET, 48: PRESETS["longlive2"]}
"""What is assumed of a checkpoint that does not tell, by its latent channels."""

CUT_MARKERS = tuple(dict.fromkeys(preset.cut_marker for preset in PRESETS.values() if preset.cut_marker))
"""What prompts begin with that begin a shot, of all families."""

_REPACKAGED = f"{_HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
TEXT_ENCODER_FILES = tuple(
    ModelFile(name, f"{_REPACKAGED}/text_encoders/{name}")
    for name in ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "umt5_xxl_fp16.safetensors")
)
VAE_FILE = ModelFile("wan_2.1_vae.safetensors", f"{_REPACKAGED}/vae/wan_2.1_vae.safetensors")
VAE_FILE_22 = ModelFile(
    "wan2.2_vae.safetensors",
    f"{_HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/vae/wan2.2_vae.safetensors",
    "for LongLive 2",
)
"""What the families read prompts and write pictures with."""

CAUSAL_MARK_PRESET = PRESETS["causal-forcing-framewise"]
"""Of files that carry ComfyUI's mark for causal models: the one family that it has repackaged."""

CONTEXT_WEIGHTS_FAMILY = "self-gradient-forcing-plus"
"""What the presets of the one family begin with whose files hold a second set of weights, for context passes."""


def preset_for_name(name: str) -> ModelPreset | None:
    """The preset of a family whose files are called so, None for no known one.

    name: of a file, with the folders that it lies in or without: `folder/file`.
    """
    for preset in reversed(PRESETS.values()):
        if any(re.search(pattern, name, re.IGNORECASE) for pattern in preset.names):
            return preset
    return None
