"""Settings as frozen values: what the cache keeps, how a chunk is sampled, how passes are computed.

Units: `chunk`, `window` and `sink` count latent frames. One latent frame is four pixel frames, the very first is one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

from .cache.codecs import CODECS
from .devices import has_float64
from .geometry import WAN_21, Geometry

ALL_FRAMES: Final = "all"
"""A window that keeps every frame."""

SAMPLERS = ("renoise", "unipc", "euler")
SINK_PHASES = ("absolute", "rebased")
CACHE_STORAGES = tuple(CODECS)
WEIGHT_STORAGES = ("model", "float8")
"""How weights are stored: in the dtype that the model computes in, or the blocks' Linear layers in float8_e4m3fn."""
ATTENTION_BACKENDS = ("native", "_native_cudnn", "flash", "_flash_3", "sage", "xformers")
"""Those of diffusers' attention backends that attend without a mask and download nothing."""
RECORDABLE_PACKINGS = ("Q8_0", "BF16")
"""GGUF packings that diffusers unpacks on the device alone; for all others the CPU waits in every layer."""


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


@dataclass(frozen=True)
class CacheConfig:
    """What a rolling cache keeps.

    window: latent frames that a chunk attends to, counting the sink and the chunk itself; ALL_FRAMES keeps every frame.
    sink: the first latent frames of the video, which never leave the window.
    sink_phase: "absolute" leaves the sink's keys where the frames were, as the original does; their distance grows with
        the video. "rebased" turns them so that they always stand just before the rest of the window.
    storage: in which form, one of `cache.codecs.CODECS`; "model" is the model's dtype.
    offload: keep the keys and values in CPU memory and bring one layer at a time to the device.
    """

    window: int | Literal["all"] = 21
    sink: int = 0
    sink_phase: str = "absolute"
    storage: str = "model"
    offload: bool = False

    def __post_init__(self):
        check_choice("sink_phase", self.sink_phase, SINK_PHASES)
        check_choice("storage", self.storage, CACHE_STORAGES)
        if self.window != ALL_FRAMES and not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(
                f'window must be "{ALL_FRAMES}" (keep every frame) or at least 1 latent frame, got {self.window!r}'
            )
        if self.sink < 0:
            raise ValueError(f"sink must not be negative, got {self.sink}")

    @property
    def limit(self) -> int | None:
        """The window in latent frames; None where it is unlimited."""
        return None if self.window == ALL_FRAMES else self.window

    @property
    def unlimited(self) -> bool:
        """Whether every frame is kept."""
        return self.limit is None

    def check_chunk(self, chunk: int) -> None:
        """Raise ValueError unless the window holds the sink and one chunk of `chunk` latent frames."""
        if self.limit is not None and self.limit < self.sink + chunk:
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
        check_choice("sampler", self.sampler, SAMPLERS)
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
    def few_step(self) -> bool:
        """Whether chunks are made in a few re-noised steps, as distilled models do, rather than by a solver in many."""
        return self.sampler == "renoise"

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance, and so a second branch with the negative prompt."""
        return self.guidance_scale != 1.0

    @property
    def branches(self) -> int:
        """Guidance branches: 2 with guidance, else 1."""
        return 2 if self.guided else 1

    def steps_at(self, start_frame: int) -> tuple[int, ...]:
        """Few-step timesteps of the chunk that starts at absolute latent frame `start_frame`."""
        return self.first_chunk_steps if self.first_chunk_steps and start_frame == 0 else self.denoising_steps

    def passes_at(self, start_frame: int) -> int:
        """Denoising steps of the chunk that starts at `start_frame`, not counting its context pass."""
        return len(self.steps_at(start_frame)) if self.few_step else self.num_inference_steps

    def passes_for(self, chunks: int, start_frame: int = 0) -> int:
        """Passes that make `chunks` chunks, at least 1, from `start_frame` on: denoising steps, and a context pass between."""
        return self.passes_at(start_frame) + (chunks - 1) * (self.passes_at(start_frame + 1) + 1)

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

    def chunks_for_seconds(self, seconds: float, start_frame: int = 0, geometry: Geometry = WAN_21) -> int:
        """Number of chunks that make at least `seconds` of video, continuing after `start_frame` latent frames."""
        frames = geometry.latent_frames_for(seconds, start_frame)
        first = self.chunk_size(start_frame)
        return 1 + max(math.ceil((frames - first) / self.chunk), 0)

    def chunk_sizes(self, chunks: int, start_frame: int = 0) -> list[int]:
        """Latent frames of each of `chunks` chunks from absolute latent frame `start_frame` on."""
        return [self.chunk_size(start_frame), *[self.chunk] * (chunks - 1)] if chunks else []


@dataclass(frozen=True)
class ExecutionConfig:
    """How passes are computed: what changes their speed and their rounding, but not what a model was trained for.

    exact: rotate in float64, and keep the original code's order of operations: bit-equal to it in float32. Off: float32
        rotation and fused operations, which agree to rounding and are faster.
    backend: attention backend of diffusers' dispatcher, one of ATTENTION_BACKENDS; None: its default, SDPA.
    compile: run the blocks through torch.compile. What changes from chunk to chunk (the cache's indices, the number of
        keys) stays outside the compiled parts, so a session compiles once per chunk size.
    cuda_graphs: once the window is full, record passes as CUDA graphs and repeat them; see `wan.graphs`.
    """

    exact: bool = field(
        default=False, metadata={"help": "rotate in float64 and keep the original code's order of operations; slower"}
    )
    backend: str | None = field(
        default=None,
        metadata={"help": "attention kernel (default: PyTorch's own choice)", "choices": ATTENTION_BACKENDS},
    )
    compile: bool = field(default=False, metadata={"help": "run the blocks through torch.compile"})
    cuda_graphs: bool = field(
        default=False, metadata={"help": "record passes as CUDA graphs and repeat them (not tried on a GPU yet)"}
    )

    def describe(self) -> list[str]:
        """What is not the default, as phrases for people."""
        phrases = {"exact": "exact", "compile": "compiled", "cuda_graphs": "CUDA graphs"}
        chosen = [phrase for name, phrase in phrases.items() if getattr(self, name)]
        return chosen + ([f"attention by {self.backend}"] if self.backend else [])

    def check(
        self,
        device: torch.device | str | None = None,
        *,
        weight_storage: str = "model",
        packings: Collection[str] = (),
        step_cache: bool = False,
    ) -> None:
        """Raise ValueError unless these settings go together, and with what they are going to run on.

        device: where the model computes; None: not known yet. weight_storage: one of WEIGHT_STORAGES. packings: of
        weights from a GGUF file, as `checkpoints.gguf.gguf_types` names them. step_cache: whether there is one.
        """
        check_choice("the weight storage", weight_storage, WEIGHT_STORAGES)
        if self.backend is not None:
            check_choice("the attention backend", self.backend, ATTENTION_BACKENDS)
            try:
                _check_attention_backend_requirements(AttentionBackendName(self.backend))
            except RuntimeError as error:
                raise ValueError(f"the attention backend {self.backend} is not installed here: {error}") from error
        if self.exact and device is not None and not has_float64(torch.device(device)):
            raise ValueError(f"exact passes rotate in float64, which {device} does not have: turn exact off")
        if weight_storage != "model" and packings:
            raise ValueError(
                f'a GGUF file keeps its own packing: set the weight storage to "model" instead of "{weight_storage}"'
            )
        if self.compile and weight_storage == "float8":
            raise ValueError(
                "weights in float8 cannot go with compile: each layer is widened outside of the compiled code, which "
                'cuts it into pieces that bring nothing. Turn compile off, or set the weight storage to "model"; the '
                "weights of a GGUF file are small and can be compiled."
            )
        if self.compile and step_cache:
            raise ValueError("a step cache cannot go with compiled blocks: turn compile off, or remove the step cache")
        if self.cuda_graphs:
            self._check_cuda_graphs(device, weight_storage, packings, step_cache)

    def _check_cuda_graphs(self, device, weight_storage: str, packings: Collection[str], step_cache: bool) -> None:
        if step_cache:
            raise ValueError("a step cache cannot go with CUDA graphs: turn them off, or remove the step cache")
        if device is not None and torch.device(device).type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, but the model is on {device}: turn them off")
        if weight_storage == "float8":
            raise ValueError(
                "weights in float8 cannot go with CUDA graphs: each layer's weights move when it runs, and a graph "
                'would go on reading the old place. Turn CUDA graphs off, or set the weight storage to "model".'
            )
        waiting = [packing for packing in packings if packing not in RECORDABLE_PACKINGS]
        if waiting:
            raise ValueError(
                f"weights packed as {', '.join(waiting)} cannot go with CUDA graphs: unpacking them copies small tables "
                "from the CPU, which cannot be recorded. Turn CUDA graphs off, or use a GGUF file in Q8_0."
            )
