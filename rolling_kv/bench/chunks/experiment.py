"""What is measured: the size of the model and of the video, and what every contender is given alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...config import CacheConfig, ExecutionConfig, SamplingConfig
from ...geometry import WAN_21
from ...sampling.schedule import Step, warp_steps
from ..figures import full_window
from ..random_model import BenchSize, random_prompt, random_weights
from .noise import draw_noise


@dataclass(frozen=True)
class Workload:
    """One measurement: every contender makes the same chunks from the same weights, prompt and noise.

    height, width: pixels. chunks: of the video. cache, compile, cuda_graphs, backend: only the engine has these; the
    window also limits the contenders that know one.
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
        self.sampling.check_cache(self.cache)
        self.execution.check(self.device)
        if self.chunks < 1:
            raise ValueError(f"at least 1 chunk must be measured, got {self.chunks}")

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        """[B, C, f, h, w] of a chunk's latents."""
        return (1, WAN_21.channels, self.sampling.chunk, *WAN_21.latent_size(self.height, self.width))

    @cached_property
    def tokens_per_frame(self) -> int:
        return WAN_21.tokens_per_frame(*self.chunk_shape[3:])

    @cached_property
    def steps(self) -> list[Step]:
        return warp_steps(self.sampling.denoising_steps, self.sampling.shift)

    @cached_property
    def prompt(self) -> Tensor:
        """Random text embedding, [1, L, D]."""
        return random_prompt(self.dtype, self.device, self.seed)

    def noise(self, chunk: int, draw: int) -> Tensor:
        """Draw number `draw` of chunk number `chunk` (from 0), in float32."""
        return draw_noise(self.seed, chunk, draw, self.chunk_shape, self.device)

    def frames_used(self, chunk: int) -> int:
        """Latent frames that chunk number `chunk` (from 0) attends to, itself included."""
        made = (chunk + 1) * self.sampling.chunk
        return min(made, self.cache.limit or made)

    @property
    def full_window(self) -> list[int]:
        # Passes over a full window run once as they are, and are recorded then; the context pass one chunk later.
        spare = 2 if self.execution.cuda_graphs else 0
        return full_window(self.chunks, self.sampling, self.cache, spare)

    def random_weights(self) -> dict[str, Tensor]:
        """Those that every contender computes with; see `bench.random_model.random_weights`."""
        return random_weights(self.size, self.dtype, self.device, self.seed)
