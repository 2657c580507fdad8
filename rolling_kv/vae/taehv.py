"""TAEHV's tiny decoder of Wan latents: pictures near those of the VAE, for a small part of its time.

Source: https://github.com/madebyollin/taehv, whose files taew2_1 and taew2_2 hold an encoder and a decoder; read here is the
decoder, whose widths and steps in time the tensors tell. It takes model latents, as the transformer makes them. Those of
LightX2V (https://huggingface.co/lightx2v/Autoencoders) are alike but for their weights, which are for raw latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from ..checkpoints.dtypes import check_floating, choose_dtype
from ..checkpoints.fingerprint import check_finite
from ..checkpoints.names import check_fit
from ..checkpoints.readers import CheckpointError, open_checkpoint, telling
from ..geometry import GEOMETRIES, Geometry, geometry_of
from .latents import to_model
from .wan import check_numbers, check_shape

PART = "decoder."
FIRST, LAST = f"{PART}1.weight", f"{PART}22.weight"
LIGHT = "lighttae"
"""Part of the names of LightX2V's files: nothing in them tells which latents they are for."""
GROWING = (7, 13, 19)
"""Where in the decoder frames become several."""
REMEMBERING = 3
"""Blocks with a memory before each of these."""
_DECODING = 900, 64
"""Values for each cell of the last level at the peak of decoding, and the width at which they were counted."""


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
    three. patch: pixels along each side that a cell of the last level becomes. raw: whether it takes raw latents.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], times: tuple[int, ...], patch: int, raw: bool = False):
        super().__init__()
        layers: list[nn.Module] = [Squash(), _conv(channels, widths[0]), nn.ReLU()]
        for width, narrower, count in zip(widths, widths[1:], times):
            layers += [Remembering(width) for _ in range(REMEMBERING)]
            layers += [nn.Upsample(scale_factor=2), Growing(width, count), _conv(width, narrower, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3 * patch**2))
        self.times, self.patch, self.raw = times, patch, raw

    def stream(self) -> TaehvStream:
        """A fresh decoding stream, which starts at the first frame of a video."""
        return TaehvStream(self)


class TinyVAE(nn.Module):
    """A tiny decoder in the place of a `WanVAE`: whatever decodes raw latents can be given it. It encodes nothing.

    Holds a `Taehv` as `.taehv`.
    """

    def __init__(self, taehv: Taehv):
        super().__init__()
        self.taehv = taehv

    @property
    def geometry(self) -> Geometry:
        """How pixels, frames and latents follow from each other."""
        return geometry_of(self._weight.shape[1])

    def compute_device(self) -> torch.device:
        """Where the weights are now."""
        return self._weight.device

    @property
    def reach(self) -> int:
        """Latent frames before one that its pixels depend on, at most."""
        frames, rate = 0.0, 1
        for times in self.taehv.times:
            frames += REMEMBERING / rate
            rate *= times
        return math.ceil(frames)

    def decoder(self) -> TinyDecoder:
        """A fresh decoding stream, which starts at the first frame of a video."""
        return TinyDecoder(self.taehv)

    def decode_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """Like `WanVAE.decode_bytes`: the values alive at the peak, counted on the meta device, and a third on top."""
        values, counted_at = _DECODING
        last: Any = self.taehv.decoder[-1]
        cells = height * width * batch // self.taehv.patch**2
        return round(values * last.in_channels / counted_at * cells) * self._weight.element_size()

    def encoder(self, *_: object) -> NoReturn:
        """Raises ValueError: there is none."""
        raise ValueError(
            f"a tiny decoder cannot encode, which pictures, videos and recomputed contexts need: load {self.geometry.name}'s VAE "
            "for that"
        )

    encode_bytes = encode_video = encode_frames = reencoder = encoder

    @property
    def _weight(self) -> Tensor:
        first: Any = self.taehv.decoder[1]
        return first.weight


class TinyDecoder:
    """Decodes consecutive chunks of raw latents, of several videos beside each other."""

    def __init__(self, taehv: Taehv):
        self._taehv = taehv
        self._streams: list[TaehvStream] = []
        self._shape: tuple[int, ...] | None = None

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next raw latents, see `StreamingDecoder.decode`."""
        return torch.cat(list(self.decode_frames(latents)), dim=2)

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode the next raw latents [B, C, f, h, w]: yields float32 frames [B, 3, 1 or 4, H, W] in [-1, 1].

        Raises ValueError for latents of another shape than the first ones, and for frames with values that are no numbers.
        """
        first: Any = self._taehv.decoder[1]
        self._shape = check_shape(latents, first.in_channels, "latents", self._shape)
        self._streams = self._streams or [self._taehv.stream() for _ in latents]
        latents = latents.float() if self._taehv.raw else to_model(latents.float())
        for frame in latents.split(1, dim=2):
            made = [next(stream.decode_frames(one)) for stream, one in zip(self._streams, frame.split(1))]
            yield check_numbers(torch.cat(made))


class TaehvStream:
    """Decodes consecutive chunks of one video; any cut into chunks gives the same frames, up to rounding."""

    def __init__(self, model: Taehv):
        self._model = model
        self._before: dict[int, Tensor] = {}  # by layer, the last frame that it has seen

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode the next latents [1, C, f, h, w] of the decoder's kind: yields float32 frames [1, 3, 1 or 4, H, W] in [-1, 1].

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
        return taehv_of(path.name, open_checkpoint(path).tensors, geometry, device)


def is_taehv(tensors: dict[str, Tensor]) -> bool:
    """Whether a file's tensors are those of a TAEHV decoder."""
    return all(name in tensors and tensors[name].ndim == 4 for name in (FIRST, LAST, *_growing()))


def taehv_of(
    name: str,
    tensors: dict[str, Tensor],
    geometry: Geometry | None,
    device: str | torch.device = "cpu",
    *,
    dtype: str | torch.dtype = "auto",
    runs_on: str | torch.device | None = None,
) -> Taehv:
    """The decoder in the tensors of a file of that name. The others are those of `load_vae`; "auto" is float32 on a CPU, else float16.

    Raises CheckpointError for those of another one.
    """
    if not is_taehv(tensors):
        raise CheckpointError("this holds no TAEHV decoder. Choose taew2_1 or taew2_2.")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(PART)}
    growing = _growing()
    widths = (*(tensors[name].shape[1] for name in growing), tensors[LAST].shape[1])
    times = tuple(tensors[name].shape[0] // width for name, width in zip(growing, widths))
    channels, patch = tensors[FIRST].shape[1], math.isqrt(tensors[LAST].shape[0] // 3)
    made = channels, math.prod(times), patch * 2 ** len(times)
    known = [geometry] if geometry is not None else list(GEOMETRIES.values())
    if made not in [(each.channels, each.temporal, each.spatial) for each in known]:
        raise CheckpointError(
            f"this decodes {channels} channels, {made[1]} frames and {made[2]} pixels a latent cell, and "
            f"{' and '.join(map(_cell, known))}. Choose taew2_1, or for Wan 2.2 5B taew2_2."
        )
    with torch.device("meta"):
        model = Taehv(channels, widths, times, patch, LIGHT in name.lower())
    check_fit(tensors, model.state_dict(), "the TAEHV decoder")
    check_floating(tensors)
    if dtype == "auto":
        dtype = torch.float32 if torch.device(runs_on or device).type == "cpu" else torch.float16
    dtype = choose_dtype(dtype, tensors, device)
    loaded = {part: tensor.to(device, dtype) for part, tensor in tensors.items()}
    check_finite(loaded)
    model.load_state_dict(loaded, assign=True)
    return model.eval().requires_grad_(False)


def _growing() -> list[str]:
    return [f"{PART}{layer}.conv.weight" for layer in GROWING]


def _cell(geometry: Geometry) -> str:
    return f"{geometry.name} has {geometry.channels}, {geometry.temporal} and {geometry.spatial}"


def _conv(inside: int, outside: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, bias=bias)
