"""Settings as frozen values: what a checkpoint was trained for, what the cache keeps, how a chunk is sampled.

Units: `chunk`, `window` and `sink` count latent frames. One latent frame is four pixel frames, the very first is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

FPS = 16
"""Frame rate that Wan 2.1 was trained at."""
PIXEL_FRAMES_PER_LATENT = 4
"""Temporal compression of the Wan VAE; the first latent frame decodes to a single pixel frame."""
SPATIAL_COMPRESSION = 8
"""Pixels per latent cell along height and width."""
TEXT_LENGTH = 512
"""Tokens that a prompt embedding is zero-padded to, as in training."""
SIZE_MULTIPLE = 16
"""Pixel height and width must be multiples of this: the VAE's 8 times the transformer's 2x2 patches."""

SAMPLERS = ("renoise", "unipc", "euler")
SINK_PHASES = ("absolute", "rebased")
STORAGES = ("model", "float8", "int8")


@dataclass(frozen=True)
class CacheConfig:
    """What a rolling cache keeps.

    window: latent frames that a chunk attends to, counting the sink and the chunk itself; -1 keeps every frame.
    sink: the first latent frames of the video, which never leave the window.
    sink_phase: "absolute" leaves the sink's keys where the frames were, as the original does; their distance grows with
        the video. "rebased" turns them so that they always stand just before the rest of the window.
    storage: "model" (the model's dtype), "float8" or "int8": see `storage.CODECS`.
    offload: keep the keys and values in CPU memory and bring one layer at a time to the device.
    """

    window: int = 21
    sink: int = 0
    sink_phase: str = "absolute"
    storage: str = "model"
    offload: bool = False

    def __post_init__(self):
        for name, value, choices in (
            ("sink_phase", self.sink_phase, SINK_PHASES),
            ("storage", self.storage, STORAGES),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.window != -1 and self.window < 1:
            raise ValueError(f"window must be -1 (keep every frame) or at least 1 latent frame, got {self.window}")
        if self.sink < 0:
            raise ValueError(f"sink must not be negative, got {self.sink}")

    def check_chunk(self, chunk: int) -> None:
        """Raise ValueError unless the window holds the sink and one chunk of `chunk` latent frames."""
        if self.window != -1 and self.window < self.sink + chunk:
            raise ValueError(
                f"a window of {self.window} latent frames cannot hold the sink ({self.sink}) and a chunk ({chunk}): "
                f"make the window at least {self.sink + chunk}, or the sink smaller"
            )


@dataclass(frozen=True)
class SamplingConfig:
    """How the frames of one chunk are made.

    chunk: latent frames per chunk, as the checkpoint was trained (3: chunk-wise, 1: frame-wise).
    independent_first_frame: the video starts with a chunk of one latent frame: 1, k, k, …
    sampler: "renoise" is few-step (distilled models): predict the clean chunk, add fresh noise, repeat. "unipc" and
        "euler" integrate the flow in `num_inference_steps` steps, for models that are not distilled.
    denoising_steps: for "renoise", the training timesteps (1000 is pure noise) before the shift warps them.
    first_chunk_steps: the same for the chunk that starts the video, where it differs (Causal-Forcing++).
    shift: timestep shift of the flow schedule.
    guidance_scale: classifier-free guidance; 1 turns it off (one model pass per step instead of two).
    context_noise: timestep at which a finished chunk is written to the cache.
    """

    chunk: int = 3
    independent_first_frame: bool = False
    sampler: str = "renoise"
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_chunk_steps: tuple[int, ...] | None = None
    num_inference_steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 1.0
    context_noise: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "denoising_steps", tuple(self.denoising_steps))
        if self.first_chunk_steps is not None:
            object.__setattr__(self, "first_chunk_steps", tuple(self.first_chunk_steps))
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 latent frame, got {self.chunk}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"context_noise is a timestep from 0 to 1000, got {self.context_noise}")
        for steps in (self.denoising_steps, self.first_chunk_steps or self.denoising_steps):
            if not steps or any(not 0 < s <= 1000 for s in steps) or list(steps) != sorted(set(steps), reverse=True):
                raise ValueError(f"denoising steps must fall from at most 1000 to above 0, got {list(steps)}")

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    def steps_at(self, start_frame: int) -> tuple[int, ...]:
        """Few-step timesteps of the chunk that starts at absolute latent frame `start_frame`."""
        return self.first_chunk_steps if self.first_chunk_steps and start_frame == 0 else self.denoising_steps

    def passes_at(self, start_frame: int) -> int:
        """Denoising steps of the chunk that starts at `start_frame`, not counting its context pass."""
        return len(self.steps_at(start_frame)) if self.sampler == "renoise" else self.num_inference_steps

    def prefill_sizes(self, frames: int, start_frame: int = 0) -> list[int]:
        """Chunk sizes in which given latent frames enter a cache that holds `start_frame`; an odd remainder comes first."""
        sizes = []
        if self.independent_first_frame and frames and start_frame == 0:
            sizes, frames = [1], frames - 1
        if frames % self.chunk:
            sizes.append(frames % self.chunk)
        return sizes + [self.chunk] * (frames // self.chunk)

    def chunk_size(self, start_frame: int) -> int:
        """Latent frames of the chunk that starts at absolute latent frame `start_frame`."""
        return 1 if self.independent_first_frame and start_frame == 0 else self.chunk

    def chunks_for_seconds(self, seconds: float, start_frame: int = 0) -> int:
        """Number of chunks that make at least `seconds` of video, continuing after `start_frame` latent frames."""
        if seconds <= 0:
            raise ValueError(f"the length must be positive, got {seconds} seconds")
        end = pixel_frames(start_frame) + max(round(seconds * FPS), 1)
        frames = math.ceil((end - 1) / PIXEL_FRAMES_PER_LATENT) + 1 - start_frame
        first = self.chunk_size(start_frame)
        return 1 + max(math.ceil((frames - first) / self.chunk), 0)

    def chunk_sizes(self, chunks: int, start_frame: int = 0) -> list[int]:
        """Latent frames of each of `chunks` chunks from absolute latent frame `start_frame` on."""
        return [self.chunk_size(start_frame), *[self.chunk] * (chunks - 1)] if chunks else []


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames that `latent_frames` latent frames decode to, counted from the start of the video."""
    return 0 if latent_frames == 0 else PIXEL_FRAMES_PER_LATENT * (latent_frames - 1) + 1


def check_size(height: int, width: int) -> tuple[int, int]:
    """The latent size of a video of `height` x `width` pixels. Raises ValueError unless both are multiples of 16."""
    for name, value in (("height", height), ("width", width)):
        if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
            lower = max(value // SIZE_MULTIPLE * SIZE_MULTIPLE, SIZE_MULTIPLE)
            raise ValueError(
                f"{name} must be a multiple of {SIZE_MULTIPLE} pixels, got {value}; "
                f"the nearest are {lower} and {lower + SIZE_MULTIPLE}"
            )
    return height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION


@dataclass(frozen=True)
class ModelPreset:
    """What a family of checkpoints was trained for: sampling and cache settings that go together."""

    name: str
    sampling: SamplingConfig = SamplingConfig()
    cache: CacheConfig = CacheConfig()

    def to_dict(self) -> dict:
        """Plain JSON values; `from_dict` reads them back."""
        values = {"name": self.name, "window": self.cache.window, "sink": self.cache.sink}
        values |= {f.name: getattr(self.sampling, f.name) for f in fields(SamplingConfig)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> ModelPreset:
        """Read what `to_dict` wrote; absent entries keep their defaults. Raises ValueError for unknown entries."""
        known = {f.name for f in fields(SamplingConfig)}
        unknown = sorted(set(values) - known - {"name", "window", "sink"})
        if unknown:
            raise ValueError(f"unknown preset entries: {', '.join(unknown)}")
        sampling = SamplingConfig(**{k: v for k, v in values.items() if k in known})
        cache = CacheConfig(**{k: v for k, v in values.items() if k in ("window", "sink")})
        return cls(values.get("name", "custom"), sampling, cache)


_CHUNKWISE = SamplingConfig()
_FRAMEWISE = SamplingConfig(chunk=1)

PRESETS: dict[str, ModelPreset] = {
    preset.name: preset
    for preset in (
        ModelPreset("self-forcing", _CHUNKWISE, CacheConfig(21)),
        ModelPreset("causal-forcing-chunkwise", _CHUNKWISE, CacheConfig(21)),
        ModelPreset("causal-forcing-framewise", _FRAMEWISE, CacheConfig(21)),
        ModelPreset(
            "causal-forcing++-2-step",
            replace(_FRAMEWISE, denoising_steps=(1000, 500), first_chunk_steps=_FRAMEWISE.denoising_steps),
            CacheConfig(21),
        ),
        ModelPreset(
            "causal-forcing++-1-step",
            replace(_FRAMEWISE, denoising_steps=(1000,), first_chunk_steps=_FRAMEWISE.denoising_steps),
            CacheConfig(21),
        ),
        ModelPreset("longlive", _CHUNKWISE, CacheConfig(12, sink=3)),
        ModelPreset("reward-forcing", _CHUNKWISE, CacheConfig(9, sink=3)),
        ModelPreset("krea-realtime", _CHUNKWISE, CacheConfig(6)),
        ModelPreset("causal-multistep", replace(_CHUNKWISE, sampler="unipc", guidance_scale=3.0), CacheConfig(21)),
    )
}
"""Presets by name, from the published settings of each family."""
