"""TAEHV's tiny decoder of Wan latents: pictures good enough to watch, for a small part of the VAE's time.

Source: https://github.com/madebyollin/taehv, whose files taew2_1 and taew2_2 hold an encoder and a decoder; read here is the
decoder, whose widths and steps in time the tensors tell. It takes model latents, as the transformer makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from ..checkpoints.dtypes import check_floating
from ..checkpoints.fingerprint import check_finite
from ..checkpoints.names import check_fit
from ..checkpoints.readers import CheckpointError, open_checkpoint, telling
from ..geometry import Geometry

PART = "decoder."
FIRST, LAST = f"{PART}1.weight", f"{PART}22.weight"
GROWING = (7, 13, 19)
"""Where in the decoder frames become several."""
REMEMBERING = 3
"""Blocks with a memory before each of these."""


class Squash(nn.Module):
    """Keeps latents between -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Remembering(nn.Module):
    """A residual block that sees each frame beside the one before it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x, before: frames [T, C, H, W], and those before them."""
        return torch.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class Growing(nn.Module):
    """Makes several frames of each."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class Taehv(nn.Module):
    """The decoder; its layers have the names of the files.

    channels: of the latents. widths: of the four levels. times: frames that each frame becomes, after each of the first
    three. patch: pixels along each side that a cell of the last level becomes.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], times: tuple[int, ...], patch: int):
        super().__init__()
        layers: list[nn.Module] = [Squash(), _conv(channels, widths[0]), nn.ReLU()]
        for width, narrower, count in zip(widths, widths[1:], times):
            layers += [Remembering(width) for _ in range(REMEMBERING)]
            layers += [nn.Upsample(scale_factor=2), Growing(width, count), _conv(width, narrower, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3 * patch**2))
        self.patch = patch

    def stream(self) -> TaehvStream:
        """A fresh decoding stream, which starts at the first frame of a video."""
        return TaehvStream(self)


class TaehvStream:
    """Decodes consecutive chunks of one video; any cut into chunks gives the same frames, up to rounding."""

    def __init__(self, model: Taehv):
        self._model = model
        self._before: dict[int, Tensor] = {}  # by layer, the last frame that it has seen

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode the next model latents [1, C, f, h, w]: yields float32 frames [1, 3, 1 or 4, H, W] in [-1, 1].

        The first latent frame of a video gives a single frame, as the VAE has it, and every other one four.
        """
        first_layer: Any = self._model.decoder[1]
        weight: Tensor = first_layer.weight
        for latent in latents.to(weight.device, weight.dtype).unbind(2):
            first, x = not self._before, latent
            for index, layer in enumerate(self._model.decoder):
                if isinstance(layer, Remembering):
                    before = self._before.get(index, torch.zeros_like(x[:1]))
                    self._before[index] = x[-1:]
                    x = layer(x, torch.cat([before, x[:-1]]))
                else:
                    x = layer(x)
            frames = pixel_shuffle(x, self._model.patch)[-1:] if first else pixel_shuffle(x, self._model.patch)
            yield (frames.float().clamp(0, 1) * 2 - 1).movedim(0, 1)[None]


def load_taehv(path: Path, geometry: Geometry, device: str | torch.device = "cpu") -> Taehv:
    """Load the decoder of a file, .pth or .safetensors; in float16, where that is fast.

    geometry: of the latents. Raises CheckpointError for a file that is another one.
    """
    with telling(path):
        tensors = {name: tensor for name, tensor in open_checkpoint(path).tensors.items() if name.startswith(PART)}
        growing = [f"{PART}{layer}.conv.weight" for layer in GROWING]
        if any(name not in tensors or tensors[name].ndim != 4 for name in (FIRST, LAST, *growing)):
            raise CheckpointError("this holds no TAEHV decoder. Choose taew2_1 or taew2_2.")
        widths = (*(tensors[name].shape[1] for name in growing), tensors[LAST].shape[1])
        times = tuple(tensors[name].shape[0] // width for name, width in zip(growing, widths))
        channels, patch = tensors[FIRST].shape[1], math.isqrt(tensors[LAST].shape[0] // 3)
        made = channels, math.prod(times), patch * 2 ** len(times)
        if made != (geometry.channels, geometry.temporal, geometry.spatial):
            raise CheckpointError(
                f"this decodes {channels} channels, {made[1]} frames and {made[2]} pixels a latent cell, and {geometry.name} "
                f"has {geometry.channels}, {geometry.temporal} and {geometry.spatial}. Choose taew2_1, or for Wan 2.2 5B taew2_2."
            )
        with torch.device("meta"):
            model = Taehv(channels, widths, times, patch)
        check_fit(tensors, model.state_dict(), "the TAEHV decoder")
        check_floating(tensors)
        check_finite(tensors)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _conv(inside: int, outside: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, bias=bias)
