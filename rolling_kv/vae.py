"""Wan's video VAEs: loading every layout users have, and decoding and encoding a stream chunk by chunk.

There are two: that of Wan 2.1 (16 latent channels, 8x8 pixels a cell) and that of Wan 2.2's 5B model (48, 16x16). Two
kinds of latents, both [B, C, F, h, w]: *raw* latents are what the VAE reads and writes (and ComfyUI's LATENT carries);
*model* latents are normalised per channel, as the transformer sees them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm, patchify, unpatchify
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from .checkpoints.dtypes import check_floating, choose_dtype
from .checkpoints.fingerprint import check_finite
from .checkpoints.float8 import load_tensor
from .checkpoints.gguf import unpack
from .checkpoints.names import VAE, check_fit, kind_of, strip_prefixes
from .checkpoints.readers import CheckpointError, known_fields, open_checkpoint, telling
from .config import check_flag, check_real, check_whole
from .geometry import GEOMETRIES, WAN_21, WAN_22, Geometry, geometry_of
from .messages import shown
from .platforms import exact_convolutions, platform_of, wants_channels_last

LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Per-channel statistics of raw latents, published with Wan 2.1."""

LATENTS_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENTS_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
"""Those published with Wan 2.2's 5B model."""

STATISTICS = {WAN_21.channels: (LATENTS_MEAN, LATENTS_STD), WAN_22.channels: (LATENTS_MEAN_22, LATENTS_STD_22)}
"""Mean and standard deviation of raw latents, by the number of their channels."""
ARCHITECTURES: dict[int, dict[str, Any]] = {
    WAN_21.channels: {},
    WAN_22.channels: {
        "z_dim": 48,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}
"""What sets the VAEs apart from diffusers' defaults, by the number of their channels."""


def to_model(latents: Tensor) -> Tensor:
    """Normalise raw latents [B, C, F, h, w] for the transformer."""
    mean, std = STATISTICS[latents.shape[1]]
    return (latents - _per_channel(mean, latents)) / _per_channel(std, latents)


def to_raw(latents: Tensor) -> Tensor:
    """Turn the transformer's latents [B, C, F, h, w] back into raw ones: the inverse of `to_model`."""
    mean, std = STATISTICS[latents.shape[1]]
    return latents * _per_channel(std, latents) + _per_channel(mean, latents)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1, 1)


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

    def _check(self, x: Tensor, channels: int, what: str) -> tuple[int, ...]:
        """Batch, height and width. Raises ValueError unless they are those that the stream began with."""
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(f"{what} must be [B, {channels}, F, H, W], got {list(x.shape)}")
        shape = (x.shape[0], *x.shape[3:])
        if self._shape not in (None, shape):
            began = list(self._shape)
            raise ValueError(f"batch, height and width are {list(shape)}, but the stream began with {began}")
        return shape

    def _to_weights(self, x: Tensor) -> Tensor:
        weight = self._vae.quant_conv.weight
        return x.to(weight.device, weight.dtype)


class StreamingDecoder(_CausalStream):
    """Decodes consecutive chunks of one video; any cut into chunks gives the same bits.

    The frames equal `AutoencoderKLWan.decode` of all latents at once bit for bit, as long as PyTorch uses one kernel
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
        shape = self._check(latents, self._geometry.channels, "latents")
        for frame in latents.split(1, dim=2):
            first, self._shape = self._shape is None, shape
            with self._exact():
                x = self._step(self._vae.post_quant_conv(self._to_weights(frame)), first_chunk=first)
            x = unpatchify(x, self._patch)
            if not x.isfinite().all():
                raise ValueError(
                    "decoding gives values that are no numbers (NaN or infinity). Load the VAE in bfloat16 or float32: "
                    "float16 is too small for it."
                )
            yield x.clamp(-1.0, 1.0).float()


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
        shape, geometry = self._check(pixels, 3, "pixels"), self._geometry
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


def streamline(vae: AutoencoderKLWan) -> None:
    """Let a stock VAE go over its pictures fewer times, to the same values up to rounding.

    Weights of 3D convolutions lie with their channels last, and so do the pictures that come out of them. There a norm is one
    kernel in the place of seven, and the activation behind it changes what the norm has just made.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, WanRMS_norm) and module.channel_first and not isinstance(module.bias, nn.Parameter):
            module.forward = partial(_norm_channels_last, module)
        elif isinstance(module, nn.SiLU):
            module.inplace = True


def _norm_channels_last(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """What a `WanRMS_norm` makes of [B, C, …], with the channels last in memory."""
    normed = rms_norm(x.movedim(1, -1), (x.shape[1],), norm.gamma.flatten(), eps=_NO_LENGTH)
    return normed.movedim(-1, 1)


_NO_LENGTH = 1e-24
"""The square of what diffusers takes for the length of a vector of zeros."""

_ORIGINAL_MARKS = ("encoder.middle.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma")
_DIFFUSERS_MARKS = ("encoder.mid_block.resnets.0.norm1.gamma", "decoder.mid_block.resnets.0.norm1.gamma")
_MIDDLE_WIDTH = 4
"""Channels of the VAE's middle block in units of its base width."""


_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
"""The layers of a residual block in the original code, and what diffusers calls them."""
_CHOOSE = (
    "Choose wan_2.1_vae.safetensors or Wan2.1_VAE.pth; for models of the kind of Wan 2.2 5B, wan2.2_vae.safetensors or "
    "Wan2.2_VAE.pth."
)


def _check_list(name: str, value: object, check: Callable[[str, object], None]) -> None:
    if not isinstance(value, list) or len(value) > 8:
        raise ValueError(f"{name} must be a list of at most 8 entries, got {shown(value)}")
    for entry in value:
        check(f"each entry of {name}", entry)


_CHECKS = {  # what config.json may tell of another architecture
    "base_dim": partial(check_whole, low=1, high=1024),
    "decoder_base_dim": partial(check_whole, low=1, high=1024),
    "num_res_blocks": partial(check_whole, low=0, high=16),
    "dim_mult": partial(_check_list, check=partial(check_whole, low=1, high=16)),
    "temperal_downsample": partial(_check_list, check=check_flag),
    "attn_scales": partial(_check_list, check=partial(check_real, low=0, high=16)),
}


@torch.inference_mode(False)
def load_vae(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    runs_on: str | torch.device | None = None,
    geometry: Geometry | None = None,
) -> WanVAE:
    """Load a Wan VAE of any width, from local files only.

    path: a diffusers folder (the VAE's own, or a pipeline with vae/ in it), or a single .safetensors or .pth file in
        the original Wan or the diffusers names.
    dtype: "float32", "float16", "bfloat16", a torch dtype, or "auto": the file's own, on CUDA float32 as bfloat16, and
        float32 on hardware without bfloat16: float16 is too small for it.
    runs_on: the device that "auto" chooses for, where the VAE is loaded to another one first.
    geometry: of the model whose latents it is for; None takes either VAE.
    Raises CheckpointError, a ValueError, when the path is missing, unreadable, or not the VAE of such a model.
    """
    path = Path(path)
    with telling(path):
        checkpoint = open_checkpoint(path / "vae" if (path / "vae").is_dir() else path)
        tensors, _ = strip_prefixes(checkpoint.tensors)
        tensors = {name: unpack(tensor) for name, tensor in tensors.items()}
        widths, given = _widths(tensors), known_fields(checkpoint.config, _CHECKS)
        family = _family(tensors, geometry)
        _check_statistics(checkpoint.config, family)
        if len(given.get("temperal_downsample", "123")) != len(given.get("dim_mult", "1234")) - 1:
            raise CheckpointError("its temperal_downsample in config.json needs one entry less than its dim_mult.")
        if _ORIGINAL_MARKS[0] in tensors:
            tensors = convert_wan_vae_to_diffusers({_flat_name(name): tensor for name, tensor in tensors.items()})
        config = widths | given | ARCHITECTURES[family.channels]
        with torch.device("meta"):  # `from_config` gives a pair only where unused settings are asked for
            vae = cast(AutoencoderKLWan, AutoencoderKLWan.from_config(config))
        check_fit(tensors, vae.state_dict(), f"the {family.name} VAE")
        check_floating(tensors)
        dtype = choose_dtype(dtype, tensors, runs_on or device, instead=torch.float32)
        loaded = {name: load_tensor(tensor, None, dtype, device) for name, tensor in tensors.items()}
        check_finite(loaded)
        if wants_channels_last(platform_of(runs_on or device), dtype):
            loaded = {name: _channels_last(tensor) for name, tensor in loaded.items()}
        vae.load_state_dict(loaded, assign=True)
    if dtype != torch.float32:  # whose bits on a CPU are those of the stock VAE
        streamline(vae)
    return WanVAE(vae).eval().requires_grad_(False)


def _channels_last(weight: Tensor) -> Tensor:
    """A weight with the same values, one of a 3D convolution with its channels last in memory."""
    return weight.contiguous(memory_format=torch.channels_last_3d) if weight.ndim == 5 else weight


def _widths(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The widths of the VAE, read off its tensors; CheckpointError unless they are those of a Wan VAE."""
    marks = next((m for m in (_ORIGINAL_MARKS, _DIFFUSERS_MARKS) if all(name in tensors for name in m)), None)
    if marks is None:
        kind = kind_of(tensors)
        kind = "a VAE of another family, or part of one" if kind == VAE else kind
        raise CheckpointError(f"this is {kind}, not a Wan 2.1 VAE or a {WAN_22.name} one. {_CHOOSE}")
    encoder, decoder = (tensors[name].shape[0] // _MIDDLE_WIDTH for name in marks)
    return {"base_dim": encoder} | ({"decoder_base_dim": decoder} if decoder != encoder else {})


def _family(tensors: dict[str, Tensor], needed: Geometry | None) -> Geometry:
    """Which of the VAEs it is, told by its latent channels; CheckpointError unless the model needs that one."""
    weight = next((tensors[name] for name in ("conv2.weight", "post_quant_conv.weight") if name in tensors), None)
    if weight is None:
        return needed or WAN_21  # the missing tensor will be named
    family = GEOMETRIES.get(weight.shape[0])
    if family is None:
        known = " and ".join(f"{geometry.name} ({channels})" for channels, geometry in GEOMETRIES.items())
        raise CheckpointError(
            f"this is another VAE, with {weight.shape[0]} latent channels; those of {known} are read here. {_CHOOSE}"
        )
    if needed not in (None, family):
        raise CheckpointError(
            f"this is the {family.name} VAE, with {family.channels} latent channels, but the model is of the kind of "
            f"{needed.name}, with {needed.channels}. {_CHOOSE}"
        )
    return family


def _flat_name(name: str) -> str:
    """A name of Wan 2.2's original code with its blocks in blocks, in the part that only diffusers' code has."""
    inner = re.fullmatch(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.(\w+)\.(.+)", name)
    if inner is None:
        return name
    half, way, block, index, part, rest = inner.groups()
    start = f"{half}.{way}_blocks.{block}"
    if part == "shortcut":
        return f"{start}.resnets.{index}.conv_shortcut.{rest}"
    if part != "residual":
        return f"{start}.{way}sampler.{part}.{rest}"
    layer, rest = rest.split(".", 1)
    return f"{start}.resnets.{index}.{_RESIDUAL.get(layer, layer)}.{rest}"


def _check_statistics(config: dict, family: Geometry) -> None:
    """A folder's config.json may name other statistics than those that LATENT has in ComfyUI."""
    for name, known in zip(("latents_mean", "latents_std"), STATISTICS[family.channels]):
        given = config.get(name) or known
        if not isinstance(given, (list, tuple)) or list(given) != list(known):
            said = f"[{', '.join(map(shown, given[:4]))}, …]" if isinstance(given, list) else shown(given)
            raise CheckpointError(
                f"its {name} in config.json is not that of {family.name}, which the models here are trained on: "
                f"{said}. Use the {family.name} VAE."
            )
