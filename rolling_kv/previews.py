"""Pictures of latents that cost next to nothing, and those of a decoder that may skip chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.functional import pixel_shuffle

from .devices import beside
from .vae.latents import to_raw
from .video import to_uint8

FITTED = Path("vae") / "latent_rgb.json"
"""Where in a model's folder the numbers of `LinearPreview` lie; `python -m tools.fit_preview` writes them."""
PRIMED = 2
"""Latent frames that are decoded again after a gap: not all that the VAE sees, but all that the eye does."""

Between = Callable[[int, int], torch.Tensor]
"""Model latents [B, C, f, h, w] of a video from one latent frame up to another: `CacheState.frames_between`."""


class LinearPreview:
    """Each latent cell of the first video becomes a few pixels, by a linear map: one picture for each latent frame.

    factors: a row for each channel of model latents, with a column for red, green and blue of each of n x n pixels, as
        `pixel_shuffle` has them. bias: a number for each column. They give colours from -1 to 1.

    Raises ValueError for numbers of other shapes.
    """

    def __init__(self, factors: Sequence[Sequence[float]], bias: Sequence[float]):
        self._factors, self._bias = (torch.tensor(numbers, dtype=torch.float32) for numbers in (factors, bias))
        self._side = math.isqrt(self._bias.numel() // 3)
        if self._bias.ndim != 1 or self._factors.shape[1:] != (3 * self._side**2,) or not self._side:
            raise ValueError(f"factors are {list(self._factors.shape)}, and the bias is {list(self._bias.shape)}")

    def pictures(self, between: Between, first: int, last: int) -> torch.Tensor:
        """uint8 [f, n * h, n * w, 3] of the latent frames from `first` up to `last`."""
        latents = between(first, last)[0].float().movedim(0, -1)  # [f, h, w, C]
        colours = (latents @ self._factors.to(latents.device) + self._bias.to(latents.device)).movedim(-1, 1)
        return to_uint8(pixel_shuffle(colours, self._side)).movedim(1, -1).cpu()


def load_fitted(model: Path) -> LinearPreview | None:
    """That of the VAE in a model's folder; None where none is there. Raises ValueError for a file that is none."""
    path = model / FITTED
    if not path.is_file():
        return None
    try:
        fitted = json.loads(path.read_text(encoding="utf-8"))
        return LinearPreview(fitted["factors"], fitted["bias"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # the last is torch's, and that of deep nesting
        raise ValueError(f"{path} holds no linear map of latents to colours: {error}") from None


class Decoder(Protocol):
    """What `WanVAE.decoder` and `Taehv.stream` give."""

    def decode_frames(self, latents: torch.Tensor) -> Iterator[torch.Tensor]: ...


class DecodedPreview:
    """The first video by a decoder that keeps its memory from chunk to chunk, and finds its way where some were left out.

    start: gives a fresh decoder of latents, which begins at a video's first frame. raw: whether it takes raw ones.
    device: where it decodes, on CUDA beside everything else.
    """

    def __init__(self, start: Callable[[], Decoder], device: torch.device, raw: bool = True):
        self._start, self._raw = start, raw
        self._beside = beside(device)
        self._decoder: Decoder | None = None
        self._next = 0

    def pictures(self, between: Between, first: int, last: int) -> torch.Tensor:
        """uint8 [T, H, W, 3] of the latent frames from `first` up to `last`."""
        decoder, self._decoder = self._decoder, None  # one that fails is half way
        begin = first
        if decoder is None or first != self._next:
            decoder, begin = self._start(), max(first - PRIMED, 0)
        latents = between(begin, last)[:1].float()
        if self._raw:
            latents = to_raw(latents)
        with nullcontext() if self._beside is None else self._beside.after_all():
            made = [
                to_uint8(frames[0]).permute(1, 2, 3, 0).cpu()
                for number, frames in enumerate(decoder.decode_frames(latents), begin)
                if number >= first
            ]
        self._decoder, self._next = decoder, last
        return torch.cat(made)
