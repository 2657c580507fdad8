"""The engine, and two other ways to make the same chunks with the same model: no cache, and a cache that grows."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from ..checkpoints.model import CausalModel
from ..checkpoints.transformer import build_transformer
from ..geometry import WAN_21
from ..presets import ModelPreset
from ..rope import rotary_angles, rotations
from ..sampling.schedule import renoise_chunk
from ..sampling.session import RollingSession
from .growing import GrowingSelfAttention
from .memory import TensorBytes, storage_bytes
from .workload import Workload


class Method:
    """One way to make a video chunk by chunk. `chunk` is called with 0, 1, 2, … and is what gets timed.

    letter, title, note: for the table. weights: shared by all methods, read only; names of the original Wan release.
    """

    letter = title = note = ""

    def __init__(self, workload: Workload, weights: dict[str, Tensor]):
        self.workload = workload

    def chunk(self, index: int) -> Tensor | None:
        """Make chunk number `index`; its clean latents, [B, C, f, h, w] in model space, if it makes any."""
        raise NotImplementedError

    @property
    def kv_bytes(self) -> int | None:
        """Bytes that keys and values take now; None for a method that keeps none."""
        return None

    @property
    def video_bytes(self) -> int:
        """Bytes of the finished video that the method itself keeps, which grow with the video by their nature."""
        return 0

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the latest chunk, where the method runs elsewhere and knows it."""
        return None

    @classmethod
    def follow_memory(cls, workload: Workload, weights: dict[str, Tensor]) -> list[int]:
        """Peak bytes of tensors during each chunk, by a run of its own. Weights count, the finished video does not."""
        with TensorBytes(storage_bytes(weights.values())) as tensors:
            method = cls(replace(workload, execution=replace(workload.execution, compile=False)), weights)
            try:
                return [method._peak(index, tensors) for index in range(workload.chunks)]
            finally:
                method.close()

    def _peak(self, index: int, tensors: TensorBytes) -> int:
        tensors.restart()
        self.chunk(index)
        return tensors.peak - self.video_bytes

    def close(self) -> None:
        """Let go of everything."""


def make_transformer(workload: Workload, weights: dict[str, Tensor]) -> WanTransformer3DModel:
    """A transformer of its own, around the shared weights."""
    return build_transformer(weights, dtype=workload.dtype, device=workload.device)


class Rolling(Method):
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


class StockSteps(Method):
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


class Growing(StockSteps):
    """(c) A cache that is concatenated on every pass and trimmed after it: diffusers pull request #13569.

    As there, the first step of a chunk appends, the later ones and the context pass overwrite, the text is projected on
    every pass, and there is no sink. Positions are absolute, as the engine has them.
    """

    letter = "c"
    title = "grow and trim with torch.cat (#13569)"
    note = "the first step of a chunk attends to window + chunk; context pass in full, after every chunk"

    def __init__(self, workload: Workload, weights: dict[str, Tensor]):
        super().__init__(workload, weights)
        window = workload.cache.limit
        limit = None if window is None else window * workload.tokens_per_frame
        self.attentions = [GrowingSelfAttention(limit) for _ in self.transformer.blocks]
        for block, attention in zip(self.transformer.blocks, self.attentions):
            block.attn1.processor = attention
        self.transformer.rope = _Positions(workload)

    def chunk(self, index):
        self.transformer.rope.move_to(index * self.workload.chunk_shape[2])
        for attention in self.attentions:
            attention.overwriting = False
        latents = self.sample(index)
        with torch.inference_mode():
            super().flow(latents, self.workload.sampling.context_noise)
        return latents

    def flow(self, latents, timestep):
        flow = super().flow(latents, timestep)
        for attention in self.attentions:
            attention.overwriting = True
        return flow

    @property
    def kv_bytes(self):
        return sum(attention.nbytes for attention in self.attentions)


class _Positions(nn.Module):
    """In the place of a transformer's rotary embedding: the rotation for a chunk that starts at any frame."""

    def __init__(self, workload: Workload):
        super().__init__()
        self.workload = workload

    def move_to(self, start: int) -> None:
        frames, height, width = self.workload.chunk_shape[2:]
        head_dim = self.workload.size.dim // self.workload.size.heads
        rotation = rotations(rotary_angles(head_dim, start, frames, *WAN_21.grid(height, width))).to(torch.complex64)
        self.rotation = rotation[None, :, None].to(self.workload.device)

    def forward(self, hidden_states):
        return self.rotation
