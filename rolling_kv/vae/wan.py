"""Wan's video VAEs, decoding and encoding a stream chunk by chunk.

There are two: that of Wan 2.1 (16 latent channels, 8x8 pixels a cell) and that of Wan 2.2's 5B model (48, 16x16). Both take
and give raw latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from types import ModuleType
from typing import TypeGuard

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanRMS_norm,
    WanUpsample,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d, pad, rms_norm, silu

from ..devices import checked_kernels
from ..geometry import WAN_21, WAN_22, Geometry, geometry_of
from ..platforms import exact_convolutions
from .latents import to_model, to_raw

_DECODING = {WAN_21.channels: (7000, 96), WAN_22.channels: (7600, 256)}
_ENCODING = {WAN_21.channels: (5000, 96), WAN_22.channels: (2600, 160)}
"""Values per pixel at the peak of each, and the width at which they were counted, by the number of latent channels."""


class WanVAE(nn.Module):
    """Holds a stock `AutoencoderKLWan` as `.vae` and hands out streams over it.

    A holder, because ComfyUI's ModelPatcher assigns `.device` on the module it manages, which diffusers models refuse.
    The stock module's own feature cache is never touched: any number of streams may interleave.
    """

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.vae = vae

    @property
    def geometry(self) -> Geometry:
        """How pixels, frames and latents follow from each other for this VAE."""
        return geometry_of(self.vae.config["z_dim"])

    def compute_device(self) -> torch.device:
        """Where the weights are now."""
        return self.vae.quant_conv.weight.device

    @property
    def reach(self) -> int:
        """Latent frames before one that its pixels depend on, at most: the causal convolutions of the decoder reach no further."""
        decoder, rate = self.vae.decoder, 1
        frames = _behind(decoder.conv_in) + _behind(decoder.mid_block)
        for block in decoder.up_blocks:
            frames += _behind(block) / rate
            upsampler = getattr(block, "upsampler", None) or next(iter(getattr(block, "upsamplers", None) or []), None)
            rate *= 2 if getattr(upsampler, "mode", "") == "upsample3d" else 1
        return math.ceil(frames + _behind(decoder.conv_out) / rate)

    def decoder(self) -> StreamingDecoder:
        """A fresh decoding stream, which starts at the first frame of a video."""
        return StreamingDecoder(self.vae)

    def encoder(self) -> StreamingEncoder:
        """A fresh encoding stream, which starts at the first frame of a video."""
        return StreamingEncoder(self.vae)

    def reencoder(self) -> StreamingReencoder:
        """A fresh stream of frames that are decoded and encoded again, which starts at the first frame of a video."""
        return StreamingReencoder(self)

    def decode_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """Rough bytes that decoding needs at its peak, weights excluded, for a picture of `height` x `width` pixels.

        Basis: the values alive at the peak, counted on the meta device (a third to a half of them the stream's features,
        which stay between calls), and a third on top for convolution workspaces.
        """
        return self._activation_bytes(_DECODING, self.vae.decoder.dim, height * width * batch)

    def encode_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """Like `decode_bytes`, for encoding."""
        return self._activation_bytes(_ENCODING, self.vae.encoder.dim, height * width * batch)

    def _activation_bytes(self, peaks: dict[int, tuple[int, int]], base_dim: int, pixels: int) -> int:
        values_per_pixel, counted_at = peaks[self.geometry.channels]
        return round(values_per_pixel * base_dim / counted_at * pixels) * self.vae.quant_conv.weight.element_size()

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Encode a whole video [B, 3, T, H, W] in [-1, 1] into raw latents [B, C, 1 + (T - 1) // 4, h, w].

        The last frames beyond 1 + 4n are left out, as ComfyUI's VAEEncode does.
        """
        return self.encoder().encode(pixels[:, :, : self.geometry.whole_frames(pixels.shape[2])])

    def encode_frames(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a video that comes frame by frame, in constant memory, to the same bits as `encode_video`.

        frames: [B, 3, 1, H, W] in [-1, 1]. Yields raw latents [B, C, 1, h, w] as soon as there are frames for one; the
        last frames beyond 1 + 4n are left out.
        """
        encoder, coming, size = self.encoder(), iter(frames), 1
        while len(piece := list(islice(coming, size))) == size:
            yield encoder.encode(torch.cat(piece, dim=2))
            size = self.geometry.temporal


def _behind(module: nn.Module) -> int:
    """Frames before one that the causal convolutions in a module see, all together."""
    convolutions = (part for part in module.modules() if isinstance(part, WanCausalConv3d))
    return sum(convolution.kernel_size[0] - 1 for convolution in convolutions)


class _CausalStream:
    """One half of the VAE with a feature cache of its own: the last two input frames of every causal convolution.

    A step that fails (out of memory, say) leaves the cache half written, so the stream ends there.
    """

    def __init__(self, vae: AutoencoderKLWan, half: nn.Module):
        self._vae = vae
        self._half = half
        self._geometry = geometry_of(vae.config["z_dim"])
        self._patch = vae.config["patch_size"] or 1
        self._features = [None] * sum(isinstance(module, WanCausalConv3d) for module in half.modules())
        self._shape = None

    def _step(self, x: Tensor, **options) -> Tensor:
        if self._features is None:
            raise RuntimeError("this VAE stream broke off inside a frame: start a new one from the first frame")
        features, self._features = self._features, None
        x = self._half(x, feat_cache=features, feat_idx=[0], **options)
        self._features = features
        return x

    def _exact(self) -> AbstractContextManager:
        """A VAE in float32 computes in it: bfloat16 is for those who want it fast."""
        return exact_convolutions(self._vae.quant_conv.weight)

    def _to_weights(self, x: Tensor) -> Tensor:
        weight = self._vae.quant_conv.weight
        return x.to(weight.device, weight.dtype)


def check_shape(x: Tensor, channels: int, what: str, began: tuple[int, ...] | None) -> tuple[int, ...]:
    """Batch, height and width of what a stream is given. Raises ValueError unless they are those that it `began` with."""
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{what} must be [B, {channels}, F, H, W], got {list(x.shape)}")
    shape = (x.shape[0], *x.shape[3:])
    if began not in (None, shape):
        raise ValueError(f"batch, height and width are {list(shape)}, but the stream began with {list(began)}")
    return shape


def check_numbers(frames: Tensor) -> Tensor:
    """Decoded frames as they are. Raises ValueError for values that are no numbers."""
    if not frames.isfinite().all():
        raise ValueError(
            "decoding gives values that are no numbers (NaN or infinity). Load the VAE in bfloat16 or float32: "
            "float16 is too small for it."
        )
    return frames


class StreamingDecoder(_CausalStream):
    """Decodes consecutive chunks of one video; any cut into chunks gives the same bits.

    The frames equal `AutoencoderKLWan.decode` of all latents at once, up to rounding where the VAE is streamlined, as
    `load_vae` does it, and else bit for bit, as long as PyTorch uses one kernel
    for the 1x1x1 convolution before the decoder. On an Intel CPU in float32 it changes kernels when 16 * B * F * h
    exceeds 20480 (more than 21 latent frames at 480 rows), and the stock decode of a longer video differs in rounding;
    on an AMD CPU it was seen to round differently for any number of frames beyond one.
    """

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__(vae, vae.decoder)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next raw latents [B, C, f, h, w] to float32 frames [B, 3, T, H, W] in [-1, 1].

        T is 4f; the first latent frame of a video gives a single pixel frame, so 1 + 4(f - 1) on the first call.
        """
        return torch.cat(list(self.decode_frames(latents)), dim=2)

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Like `decode`, one latent frame at a time: yields [B, 3, 1 or 4, H, W].

        A caller may stop after any yield; the stream then continues with the next latent frame. Raises ValueError for
        frames with values that are no numbers.
        """
        shape = check_shape(latents, self._geometry.channels, "latents", self._shape)
        for frame in latents.split(1, dim=2):
            first, self._shape = self._shape is None, shape
            with self._exact():
                x = self._step(self._vae.post_quant_conv(self._to_weights(frame)), first_chunk=first)
            yield check_numbers(unpatchify(x, self._patch)).clamp(-1.0, 1.0).float()


class StreamingEncoder(_CausalStream):
    """Encodes consecutive pieces of one video; any cut gives the same bits.

    Equal to the mode of `AutoencoderKLWan.encode` of everything at once, with the same remark on kernels as for
    `StreamingDecoder` (here for the 1x1x1 convolution after the encoder, from 32 * B * F * h = 20480 on).
    """

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__(vae, vae.encoder)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode the next frames [B, 3, T, H, W] in [-1, 1] to float32 raw latents [B, C, f, h, w].

        T is 1 + 4n on the first call and 4n later, for f = 1 + n and n. Raises ValueError for any other count, which
        `WanVAE.encode_video` trims instead, and for sizes that are no multiples of a latent cell.
        """
        return torch.cat(list(self.encode_frames(pixels)), dim=2)

    def encode_frames(self, pixels: Tensor) -> Iterator[Tensor]:
        """Like `encode`, one latent frame at a time: yields [B, C, 1, h, w]."""
        shape, geometry = check_shape(pixels, 3, "pixels", self._shape), self._geometry
        frames, height, width = pixels.shape[2:]
        if height % geometry.spatial or width % geometry.spatial:
            size = f"{height}x{width}"
            raise ValueError(f"height and width must be multiples of {geometry.spatial} pixels, got {size}")
        first = 1 if self._shape is None else 0
        rest = (frames - first) % geometry.temporal
        if rest:
            rule = "1 + 4n frames" if first else "4n frames after the first call"
            more = geometry.temporal - rest
            raise ValueError(f"the encoder takes {rule}, got {frames}: leave out the last {rest} or give {more} more")
        self._shape = shape
        sizes = [1] * first + [geometry.temporal] * (frames // geometry.temporal)
        for piece in pixels.split(sizes, dim=2):
            with self._exact():
                moments = self._vae.quant_conv(self._step(patchify(self._to_weights(piece), self._patch)))
            yield moments[:, : geometry.channels].float()


class StreamingReencoder:
    """Turns frames of a video, in their order, into pictures of their own: what a recomputed context begins with."""

    def __init__(self, vae: WanVAE):
        self._vae = vae
        self._decoder = vae.decoder()

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode the next model latents [B, C, f, h, w] of the video, and encode their very last pixel frame alone.

        Returns model latents [B, C, 1, h, w] in float32. Raises ValueError as `StreamingDecoder.decode_frames` does.
        """
        for pixels in self._decoder.decode_frames(to_raw(latents.float())):
            last = pixels[:, :, -1:]
        return to_model(self._vae.encoder().encode(last))


def streamline(vae: nn.Module) -> None:
    """Let a stock VAE, or parts of one, go over its pictures fewer times, to the same values up to rounding.

    Weights of 3D convolutions lie with their channels last, and so do the pictures that come out of them. There a norm is one
    kernel in the place of seven, and the activation behind it is a part of that kernel where Triton makes one in half precision;
    elsewhere it changes what the norm has just made. With others PyTorch leaves
    cuDNN 9.8 to 9.14 aside in half precision (2.9.0 every later one too), and takes many times the time and memory.
    Convolutions take zeros for what is outside of a picture, which then needs no copy with a margin, and pictures are enlarged
    in their own precision. On a CPU in float32 a convolution goes over pictures, not over a video.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        if isinstance(module, WanCausalConv3d):
            module.forward = partial(_convolved_to_the_margin, module)
        elif isinstance(module, WanUpsample):
            module.forward = partial(_enlarged, module)
        elif _can_be_last(module):
            module.forward = partial(_norm_channels_last, module)
    for module in list(vae.modules()):
        activated = [norm for name, norm in module.named_children() if name in _ACTIVATED]
        norms = [norm for norm in activated if _can_be_last(norm)]
        if norms and norms == activated and isinstance(module.nonlinearity, nn.SiLU):
            module.nonlinearity = nn.Identity()
            for norm in norms:
                norm.forward = partial(_activated_norm, norm)


def _convolved_to_the_margin(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """What a `WanCausalConv3d` makes of frames, and of those before them."""
    across, _, down, _, missing, _ = map(int, conv._padding)
    if cache_x is not None and missing:
        x = torch.cat([cache_x.to(x.device), x], dim=2)
        missing -= cache_x.shape[2]
    if missing:  # the first frames of a video
        x = pad(x, (0, 0, 0, 0, missing, 0))
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _by_frames(conv, x, (down, across))
    return conv3d(x, conv.weight, conv.bias, conv.stride, (0, down, across))


def _by_frames(conv: WanCausalConv3d, x: Tensor, margin: tuple[int, int]) -> Tensor:
    """What `conv` makes of [B, C, T, H, W] with no margin in time, as a sum of convolutions of pictures.

    A CPU's kernels for those are as fast at every width. Of those for three dimensions, the ones of narrow VAEs take up to
    ten times as long.
    """
    frames, (step, down, across) = x.transpose(1, 2), conv.stride
    made = (frames.shape[1] - conv.kernel_size[0]) // step + 1
    ends = step * (made - 1) + 1
    seen = [frames[:, place : place + ends : step].flatten(0, 1) for place in range(conv.kernel_size[0])]
    first, *others = conv.weight.unbind(2)
    out = conv2d(seen[0], first, conv.bias, (down, across), margin)
    for pictures, weight in zip(seen[1:], others):
        out.add_(conv2d(pictures, weight, None, (down, across), margin))
    return out.unflatten(0, (-1, made)).transpose(1, 2)


def _enlarged(upsample: WanUpsample, x: Tensor) -> Tensor:
    """What a `WanUpsample` makes of pictures, without its way over float32."""
    return nn.Upsample.forward(upsample, x)


_ACTIVATED = ("norm1", "norm2", "norm_out")
"""Norms behind which their module has its activation."""


def _can_be_last(module: nn.Module) -> TypeGuard[WanRMS_norm]:
    return isinstance(module, WanRMS_norm) and module.channel_first and not isinstance(module.bias, nn.Parameter)


def _activated_norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """What a `WanRMS_norm` and a SiLU make of [B, C, …], with the channels last in memory."""
    kernels = checked_kernels(_load_kernels, x.device) if x.dtype.itemsize == 2 else None
    if kernels is not None:
        return kernels.activated_norm(x, norm.gamma, _NO_LENGTH)
    return silu(_norm_channels_last(norm, x), inplace=True)


def _load_kernels() -> ModuleType:
    from . import kernels

    return kernels


def _norm_channels_last(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """What a `WanRMS_norm` makes of [B, C, …], with the channels last in memory."""
    normed = rms_norm(x.movedim(1, -1), (x.shape[1],), norm.gamma.flatten(), eps=_NO_LENGTH)
    return normed.movedim(-1, 1)


_NO_LENGTH = 1e-24
"""The square of what diffusers takes for the length of a vector of zeros."""
