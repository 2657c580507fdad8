"""The context that is computed anew before every chunk, as Krea Realtime has it (https://github.com/krea-ai/realtime-video).

Nothing stays in the caches from chunk to chunk. Before a chunk they are emptied, and the frames in view go through the
model again: a first one, then the last ones, at the positions 0, 1, 2, …, under the prompt of the chunk before. Once the
video's first frame is out of view, the first one is the frame that has just left, decoded and encoded again as a picture
of its own, as if the video began there. It follows from the video and the VAE, so no state has to keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..config import CacheConfig, SamplingConfig
from .history import History
from .state import CacheState

Reencode = Callable[[torch.Tensor], torch.Tensor]
"""The next model latents [B, C, f, h, w] of a video -> those of its last pixel frame as a picture, [B, C, 1, h, w]."""


class Reencoding(Protocol):
    """What a recomputed context asks of a VAE; `vae.WanVAE` has it."""

    def reencoder(self) -> Reencode:
        """A fresh stream, which starts at the first frame of a video."""
        ...


def context_passes(cache: CacheConfig, sampling: SamplingConfig, frames: int, chunks: int) -> int:
    """Context passes of `chunks` chunks that follow `frames` latent frames."""
    passes, most = 0, _in_view(cache, sampling.chunk)
    for number, size in enumerate(sampling.chunk_sizes(chunks, frames)):
        if frames >= most:  # from here on all chunks are alike, however many there are
            return passes + (chunks - number) * -(-most // sampling.chunk)
        passes += -(-frames // sampling.chunk)
        frames += size
    return passes


def needs_vae(cache: CacheConfig, sampling: SamplingConfig, state: CacheState, chunks: int) -> bool:
    """Whether `chunks` more chunks need a VAE for their context."""
    if cache.context != "recomputed" or not chunks:
        return False
    generated = state.generated + sampling.frames_of(chunks - 1, state.frames)
    return not _keeps_first(cache, sampling.chunk, generated)


def check_vae(cache: CacheConfig, sampling: SamplingConfig, state: CacheState, chunks: int, vae) -> None:
    """Raise ValueError if `chunks` more chunks need a VAE for their context and there is none."""
    if vae is None and needs_vae(cache, sampling, state, chunks):
        raise ValueError(
            f"from latent frame {cache.window} on, this model's context begins with a frame that is decoded and encoded "
            'again, which needs a VAE: give one, or keep the first frame (a sink of 1), or choose the context "kept", a '
            "plain window"
        )


def _in_view(cache: CacheConfig, chunk: int) -> int:
    """Latent frames that a chunk sees beside its own, once there are as many."""
    assert cache.limit is not None
    return cache.limit - chunk


def _keeps_first(cache: CacheConfig, chunk: int, generated: int) -> bool:
    """Whether the video's first frame begins the context after so many latent frames were generated."""
    return cache.sink == 1 or generated - chunk < _in_view(cache, chunk)


@dataclass(frozen=True)
class RecomputedContext(History):
    """The same face as a history that stays in the caches.

    reencoded: where frames come from that are decoded and encoded again; None without a VAE.
    """

    reencoded: ReencodedFrames | None = None

    def bring_to(self, state, switch, prompt, negative, timestep, on_pass) -> None:
        """Fill the caches with what the next chunk sees. `switch` is empty here, and the chunk's own prompt comes later."""
        self.branches.start_over()
        if state.records:
            prompts = self._prompts_of(state, len(state.records) - 1, negative)
            self._write(self._context(state), self.chunk, self._for_prompts(*prompts), timestep, on_pass)

    def _context(self, state: CacheState) -> torch.Tensor:
        """The latent frames in view, [B, C, n, h, w]."""
        config, end = self.branches.spec.config, state.frames
        start = end - _in_view(config, self.chunk)
        if start <= 0:
            return state.frames_between(0, end)
        rest = state.frames_between(start + 1, end)
        if _keeps_first(config, self.chunk, state.generated):
            first = state.frames_between(0, 1)
        else:
            assert self.reencoded is not None  # `check_vae` has seen to it
            first = self.reencoded.frame(state, start)
        return torch.cat([first.to(rest), rest], dim=2)


class ReencodedFrames:
    """Frames of a video that grows, each decoded and encoded again.

    The video is decoded once, as far as it is needed: from its start also where it comes from a state.
    """

    def __init__(self, vae: Reencoding):
        self._vae = vae
        self._stream: Reencode | None = None
        self._end = 0  # latent frames that the stream has seen
        self._last: torch.Tensor | None = None

    def frame(self, state: CacheState, index: int) -> torch.Tensor:
        """The latent frame number `index` of the state's video, [B, C, 1, h, w]."""
        if self._stream is None or index < self._end - 1:
            self._stream, self._end = self._vae.reencoder(), 0
        if self._last is None or index >= self._end:
            stream, self._stream = self._stream, None  # a step that fails leaves it half written
            with torch.inference_mode():
                self._last = stream(state.frames_between(self._end, index + 1))
            self._stream, self._end = stream, index + 1
        return self._last

    def release(self) -> None:
        """Give the stream's memory back now, whoever still refers to it."""
        self._stream = self._last = None
