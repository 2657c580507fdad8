"""What is compared: ways to make the same chunks with the same model. The engine, and one that keeps no cache."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ...checkpoints.model import CausalModel
from ...checkpoints.transformer import build_transformer
from ...presets import ModelPreset
from ...sampling.schedule import renoise_chunk
from ...sampling.session import RollingSession
from ..gauges import TensorBytes, storage_bytes
from .experiment import Workload


class Contender:
    """One way to make a video chunk by chunk. `chunk` is called with 0, 1, 2, … and is what gets timed.

    letter, title, note: for the table. weights: shared by all, read only; names of the original Wan release.
    """

    letter = title = note = ""

    def __init__(self, workload: Workload, weights: dict[str, Tensor]):
        self.workload = workload

    def chunk(self, index: int) -> Tensor | None:
        """Make chunk number `index`; its clean latents, [B, C, f, h, w] in model space, if it makes any."""
        raise NotImplementedError

    @property
    def kv_bytes(self) -> int | None:
        """Bytes that keys and values take now; None where none are kept."""
        return None

    @property
    def video_bytes(self) -> int:
        """Bytes of the finished video that the contender itself keeps, which grow with the video by their nature."""
        return 0

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the latest chunk, where it runs elsewhere and knows it."""
        return None

    @classmethod
    def follow_memory(cls, workload: Workload, weights: dict[str, Tensor]) -> list[int]:
        """Peak bytes of tensors during each chunk, by a run of its own. Weights count, the finished video does not."""
        with TensorBytes(storage_bytes(weights.values())) as tensors:
            contender = cls(replace(workload, execution=replace(workload.execution, compile=False)), weights)
            try:
                return [contender._peak(index, tensors) for index in range(workload.chunks)]
            finally:
                contender.close()

    def _peak(self, index: int, tensors: TensorBytes) -> int:
        tensors.restart()
        self.chunk(index)
        return tensors.peak - self.video_bytes

    def close(self) -> None:
        """Let go of everything."""


def make_transformer(workload: Workload, weights: dict[str, Tensor]) -> WanTransformer3DModel:
    """A transformer of its own, around the shared weights."""
    return build_transformer(weights, dtype=workload.dtype, device=workload.device)


class Rolling(Contender):
    """(a) This package's engine. A chunk's context pass runs when the next chunk begins, and is timed with that one."""

    letter = "a"
    title = "rolling cache (this engine)"
    note = "one context pass and the steps per chunk; the first chunk has no context pass before it"

    def __init__(self, workload: Workload, weights: dict[str, Tensor]):
        super().__init__(workload, weights)
        preset = ModelPreset("bench", workload.sampling, workload.cache)
        self.session = RollingSession(
            CausalModel(make_transformer(workload, weights), preset),
            workload.prompt,
            height=workload.height,
            width=workload.width,
            execution=workload.execution,
        )
        self.stack = ExitStack()
        self.stack.enter_context(self.session)
        self.chunks = self.session.generate(
            workload.chunks, noise_source=lambda start, draw, shape: workload.noise(start // shape[2], draw)
        )

    def chunk(self, index):
        return next(self.chunks).latents

    @property
    def kv_bytes(self):
        return sum(self.session.cache_bytes)

    @property
    def video_bytes(self):
        return sum(chunk.nbytes for chunk in self.session.state.chunks)

    def close(self):
        self.chunks.close()
        self.stack.close()


class StockSteps(Contender):
    """Sampling by calls of a diffusers transformer whose forward is the stock one."""

    def __init__(self, workload: Workload, weights: dict[str, Tensor]):
        super().__init__(workload, weights)
        self.transformer = make_transformer(workload, weights)

    def sample(self, index: int) -> Tensor:
        """The clean latents of chunk number `index`, through `flow`."""
        workload = self.workload
        with torch.inference_mode():
            return renoise_chunk(self.flow, lambda draw: workload.noise(index, draw).to(workload.dtype), workload.steps)

    def flow(self, latents: Tensor, timestep: float) -> Tensor:
        timesteps = torch.full((1,), timestep, device=latents.device)
        return self.transformer(latents, timesteps, self.workload.prompt, return_dict=False)[0]


class Recompute(StockSteps):
    """(b) No cache: every step runs the stock transformer over the window's finished frames and the chunk together.

    One timestep for all frames, and all frames attend to each other, so from the second chunk on it is the price of
    recomputing the window, not the same video. A block-causal mask would only make it slower.
    """

    letter = "b"
    title = "no cache, window recomputed"
    note = "each step is one stock pass over all frames in the window (no mask, one timestep); no context pass"

    def __init__(self, workload: Workload, weights: dict[str, Tensor]):
        super().__init__(workload, weights)
        self.past = torch.empty(0)

    def chunk(self, index):
        frames = self.workload.chunk_shape[2]
        context = self.workload.frames_used(index) - frames
        if not index:
            self.past = self.workload.noise(0, 0)[:, :, :0].to(self.workload.dtype)
        self.past = self.past[:, :, self.past.shape[2] - context :].contiguous()
        latents = self.sample(index)
        self.past = torch.cat([self.past, latents], dim=2)
        return latents

    def flow(self, latents, timestep):
        return super().flow(torch.cat([self.past, latents], dim=2), timestep)[:, :, self.past.shape[2] :]
