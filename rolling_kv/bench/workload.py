"""What is measured: the size of the model and of the video, and random weights of the true shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..config import CacheConfig, ExecutionConfig, SamplingConfig
from ..geometry import TEXT_LENGTH, WAN_21
from ..sampling.schedule import Step, warp_steps
from .noise import draw_noise

HEAD_DIM = 128
"""Of every Wan model; ComfyUI takes it for granted."""
CHANNELS = 16
TEXT_DIM = 4096
FREQ_DIM = 256


@dataclass(frozen=True)
class BenchSize:
    """The shape of a model, and the video that it is measured on by default: pixels, window in latent frames."""

    layers: int
    dim: int
    ffn: int
    height: int
    width: int
    window: int

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM


SIZES = {
    "tiny": BenchSize(4, 128, 256, 64, 64, window=9),
    "mid": BenchSize(8, 512, 2048, 240, 416, window=7),
    "1.3B": BenchSize(30, 1536, 8960, 480, 832, window=21),
    "14B": BenchSize(40, 5120, 13824, 480, 832, window=21),
}
"""1.3B and 14B are Wan 2.1's. mid is for CPUs, tiny for tests."""


@dataclass(frozen=True)
class Workload:
    """One measurement: every method makes the same chunks from the same weights, prompt and noise.

    height, width: pixels. chunks: of the video. cache, compile, cuda_graphs, backend: only the engine has these; the
    window also limits the methods that know one.
    Raises ValueError for a video size or a window that the engine does not take.
    """

    size: BenchSize
    height: int
    width: int
    chunks: int
    cache: CacheConfig
    sampling: SamplingConfig = SamplingConfig()
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    execution: ExecutionConfig = ExecutionConfig()
    seed: int = 0

    def __post_init__(self):
        WAN_21.latent_size(self.height, self.width)
        self.cache.check_chunk(self.sampling.chunk)
        self.execution.check(self.device)
        if self.chunks < 1:
            raise ValueError(f"at least 1 chunk must be measured, got {self.chunks}")

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        """[B, C, f, h, w] of a chunk's latents."""
        return (1, CHANNELS, self.sampling.chunk, *WAN_21.latent_size(self.height, self.width))

    @cached_property
    def tokens_per_frame(self) -> int:
        return WAN_21.tokens_per_frame(*self.chunk_shape[3:])

    @cached_property
    def steps(self) -> list[Step]:
        return warp_steps(self.sampling.denoising_steps, self.sampling.shift)

    @cached_property
    def prompt(self) -> Tensor:
        """Random text embedding, [1, L, D]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=generator).to(self.device, self.dtype)

    def noise(self, chunk: int, draw: int) -> Tensor:
        """Draw number `draw` of chunk number `chunk` (from 0), in float32."""
        return draw_noise(self.seed, chunk, draw, self.chunk_shape, self.device)

    def frames_used(self, chunk: int) -> int:
        """Latent frames that chunk number `chunk` (from 0) attends to, itself included."""
        made = (chunk + 1) * self.sampling.chunk
        return min(made, self.cache.limit or made)

    @property
    def full_window(self) -> list[int]:
        return full_window(self.chunks, self.sampling, self.cache)

    @torch.inference_mode(False)
    def random_weights(self) -> dict[str, Tensor]:
        """Weights under the names of the original Wan release, made in the dtype and on the device they are used in.

        Scaled by their fan-in, so that activations stay near 1: functions such as tanh take longer far outside.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def fill(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.endswith("bias"):
                return torch.zeros(shape, dtype=self.dtype, device=self.device)
            if "norm" in name:
                return torch.ones(shape, dtype=self.dtype, device=self.device)
            fan_in = shape[-1] if "modulation" in name else torch.Size(shape[1:]).numel()
            values = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
            return values.mul_(fan_in**-0.5)

        return {name: fill(name, shape) for name, shape in weight_shapes(self.size).items()}


def full_window(chunks: int, sampling: SamplingConfig, cache: CacheConfig) -> list[int]:
    """Numbers (from 0) of the chunks whose passes all see a full window; the last chunk alone if there are none."""
    full = [i for i in range(chunks) if cache.limit is not None and i * sampling.chunk >= cache.limit]
    return full or [chunks - 1]


def weight_shapes(size: BenchSize) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Wan 2.1 text-to-video model of that size."""
    dim, ffn = size.dim, size.ffn
    linears = {
        "text_embedding.0": (dim, TEXT_DIM), "text_embedding.2": (dim, dim), "time_embedding.0": (dim, FREQ_DIM),
        "time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim), "head.head": (4 * CHANNELS, dim),
        "patch_embedding": (dim, CHANNELS, 1, 2, 2),
    }  # fmt: skip
    others = {"head.modulation": (1, 2, dim)}
    for block in (f"blocks.{index}" for index in range(size.layers)):
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            linears |= {f"{attention}.{name}": (dim, dim) for name in "qkvo"}
            others |= {f"{attention}.norm_{name}.weight": (dim,) for name in "qk"}
        linears |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
        others |= {f"{block}.modulation": (1, 6, dim)}
        others |= {f"{block}.norm3.{name}": (dim,) for name in ("weight", "bias")}
    biases = {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return {f"{name}.weight": shape for name, shape in linears.items()} | biases | others
