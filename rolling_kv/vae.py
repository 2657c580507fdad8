"""The Wan 2.1 video VAE: loading every layout users have, and decoding and encoding a stream chunk by chunk.

Two kinds of latents, both [B, 16, F, h, w] with h and w an eighth of the picture: *raw* latents are what the VAE reads
and writes (and ComfyUI's LATENT carries); *model* latents are normalised per channel, as the transformer sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from .checkpoints.dtypes import check_floating, choose_dtype
from .checkpoints.fingerprint import check_finite
from .checkpoints.float8 import load_tensor
from .checkpoints.gguf import unpack
from .checkpoints.names import VAE, check_fit, kind_of, strip_prefixes
from .checkpoints.readers import CheckpointError, known_fields, open_checkpoint, telling
from .config import check_flag, check_real, check_whole
from .geometry import WAN_21, Geometry, geometry_of
from .messages import shown

LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Per-channel statistics of raw latents, published with Wan 2.1."""


def to_model(latents: Tensor) -> Tensor:
    """Normalise raw latents [B, 16, F, h, w] for the transformer."""
    return (latents - _per_channel(LATENTS_MEAN, latents)) / _per_channel(LATENTS_STD, latents)


def to_raw(latents: Tensor) -> Tensor:
    """Turn the transformer's latents [B, 16, F, h, w] back into raw ones: the inverse of `to_model`."""
    return latents * _per_channel(LATENTS_STD, latents) + _per_channel(LATENTS_MEAN, latents)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1, 1)


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

    def decoder(self) -> StreamingDecoder:
        """A fresh decoding stream, which starts at the first frame of a video."""
        return StreamingDecoder(self.vae)

    def encoder(self) -> StreamingEncoder:
        """A fresh encoding stream, which starts at the first frame of a video."""
        return StreamingEncoder(self.vae)

    def decode_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """Rough bytes that decoding needs at its peak, weights excluded, for a picture of `height` x `width` pixels.

        Basis: at base_dim 96 the tensors alive at the peak hold 5100 values per pixel (2400 of them the stream's
        features, which stay between calls), counted on the meta device; a third on top for convolution workspaces.
        """
        return self._activation_bytes(7000, self.vae.decoder.dim, height * width * batch)

    def encode_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """Like `decode_bytes`, for encoding: 3800 values per pixel (1400 of them features), and a third on top."""
        return self._activation_bytes(5000, self.vae.encoder.dim, height * width * batch)

    def _activation_bytes(self, values_per_pixel: int, base_dim: int, pixels: int) -> int:
        return round(values_per_pixel * base_dim / 96 * pixels) * self.vae.quant_conv.weight.element_size()

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Encode a whole video [B, 3, T, H, W] in [-1, 1] into raw latents [B, 16, 1 + (T - 1) // 4, H / 8, W / 8].

        The last frames beyond 1 + 4n are left out, as ComfyUI's VAEEncode does.
        """
        frames = pixels.shape[2]
        return self.encoder().encode(pixels[:, :, : frames - (frames - 1) % WAN_21.temporal])


class _CausalStream:
    """One half of the VAE with a feature cache of its own: the last two input frames of every causal convolution.

    A step that fails (out of memory, say) leaves the cache half written, so the stream ends there.
    """

    def __init__(self, vae: AutoencoderKLWan, half: nn.Module):
        self._vae = vae
        self._half = half
        self._features = [None] * sum(isinstance(module, WanCausalConv3d) for module in half.modules())
        self._shape = None

    def _step(self, x: Tensor) -> Tensor:
        if self._features is None:
            raise RuntimeError("this VAE stream broke off inside a frame: start a new one from the first frame")
        features, self._features = self._features, None
        self._shape = (x.shape[0], *x.shape[3:])
        x = self._half(x, feat_cache=features, feat_idx=[0])
        self._features = features
        return x

    def _check(self, x: Tensor, channels: int, what: str) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(f"{what} must be [B, {channels}, F, H, W], got {list(x.shape)}")
        shape = (x.shape[0], *x.shape[3:])
        if self._shape not in (None, shape):
            began = list(self._shape)
            raise ValueError(f"batch, height and width are {list(shape)}, but the stream began with {began}")

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
        """Decode the next raw latents [B, 16, f, h, w] to float32 frames [B, 3, T, 8h, 8w] in [-1, 1].

        T is 4f; the first latent frame of a video gives a single pixel frame, so 1 + 4(f - 1) on the first call.
        """
        return torch.cat(list(self.decode_frames(latents)), dim=2)

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Like `decode`, one latent frame at a time: yields [B, 3, 1 or 4, 8h, 8w].

        A caller may stop after any yield; the stream then continues with the next latent frame. Raises ValueError for
        frames with values that are no numbers.
        """
        self._check(latents, WAN_21.channels, "latents")
        for frame in latents.split(1, dim=2):
            x = self._step(self._vae.post_quant_conv(self._to_weights(frame)))
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
        self._started = False

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode the next frames [B, 3, T, H, W] in [-1, 1] to float32 raw latents [B, 16, f, H / 8, W / 8].

        T is 1 + 4n on the first call and 4n later, for f = 1 + n and n. Raises ValueError for any other count, which
        `WanVAE.encode_video` trims instead, and for sizes that are not multiples of 8.
        """
        return torch.cat(list(self.encode_frames(pixels)), dim=2)

    def encode_frames(self, pixels: Tensor) -> Iterator[Tensor]:
        """Like `encode`, one latent frame at a time: yields [B, 16, 1, H / 8, W / 8]."""
        self._check(pixels, 3, "pixels")
        frames, height, width = pixels.shape[2:]
        if height % WAN_21.spatial or width % WAN_21.spatial:
            size = f"{height}x{width}"
            raise ValueError(f"height and width must be multiples of {WAN_21.spatial} pixels, got {size}")
        first = 0 if self._started else 1
        rest = (frames - first) % WAN_21.temporal
        if rest:
            rule = "1 + 4n frames" if first else "4n frames after the first call"
            more = WAN_21.temporal - rest
            raise ValueError(f"the encoder takes {rule}, got {frames}: leave out the last {rest} or give {more} more")
        self._started = True
        sizes = [1] * first + [WAN_21.temporal] * (frames // WAN_21.temporal)
        for piece in pixels.split(sizes, dim=2):
            moments = self._vae.quant_conv(self._step(self._to_weights(piece)))
            yield moments[:, : WAN_21.channels].float()


_ORIGINAL_MARKS = ("encoder.middle.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma")
_DIFFUSERS_MARKS = ("encoder.mid_block.resnets.0.norm1.gamma", "decoder.mid_block.resnets.0.norm1.gamma")
_MIDDLE_WIDTH = 4
"""Channels of the VAE's middle block in units of its base width."""


def _check_list(name: str, value: object, check: Callable[[str, object], None]) -> None:
    if not isinstance(value, list) or len(value) > 8:
        raise ValueError(f"{name} must be a list of at most 8 entries, got {shown(value)}")
    for entry in value:
        check(f"each entry of {name}", entry)


_CHECKS = {  # what config.json may tell of another architecture; a Wan 2.1 VAE is that of diffusers' defaults
    "base_dim": partial(check_whole, low=1, high=1024),
    "decoder_base_dim": partial(check_whole, low=1, high=1024),
    "z_dim": partial(check_whole, low=WAN_21.channels, high=WAN_21.channels),
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
) -> WanVAE:
    """Load a Wan 2.1 VAE of any width, from local files only.

    path: a diffusers folder (the VAE's own, or a pipeline with vae/ in it), or a single .safetensors or .pth file in
        the original Wan or the diffusers names.
    dtype: "float32", "float16", "bfloat16", a torch dtype, or "auto": the file's own, on CUDA float32 as bfloat16.
    runs_on: the device that "auto" chooses for, where the VAE is loaded to another one first.
    Raises CheckpointError, a ValueError, when the path is missing, unreadable or not a Wan 2.1 VAE.
    """
    path = Path(path)
    with telling(path):
        checkpoint = open_checkpoint(path / "vae" if (path / "vae").is_dir() else path)
        tensors, _ = strip_prefixes(checkpoint.tensors)
        tensors = {name: unpack(tensor) for name, tensor in tensors.items()}
        _check_statistics(checkpoint.config)
        widths, given = _widths(tensors), known_fields(checkpoint.config, _CHECKS)
        if len(given.get("temperal_downsample", "123")) != len(given.get("dim_mult", "1234")) - 1:
            raise CheckpointError("its temperal_downsample in config.json needs one entry less than its dim_mult.")
        if _ORIGINAL_MARKS[0] in tensors:
            tensors = convert_wan_vae_to_diffusers(tensors)
        with torch.device("meta"):  # `from_config` gives a pair only where unused settings are asked for
            vae = cast(AutoencoderKLWan, AutoencoderKLWan.from_config(widths | given))
        check_fit(tensors, vae.state_dict(), "the Wan 2.1 VAE")
        check_floating(tensors)
        dtype = choose_dtype(dtype, tensors, runs_on or device)
        loaded = {name: load_tensor(tensor, None, dtype, device) for name, tensor in tensors.items()}
        check_finite(loaded)
        vae.load_state_dict(loaded, assign=True)
    return WanVAE(vae).eval().requires_grad_(False)


def _widths(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The widths of the VAE, read off its tensors; CheckpointError unless they are those of a Wan 2.1 VAE."""
    marks = next((m for m in (_ORIGINAL_MARKS, _DIFFUSERS_MARKS) if all(name in tensors for name in m)), None)
    if marks is None:
        kind = kind_of(tensors)
        kind = "a VAE of another family, or part of one" if kind == VAE else kind
        raise CheckpointError(f"this is {kind}, not a Wan 2.1 VAE. Choose wan_2.1_vae.safetensors or Wan2.1_VAE.pth.")
    channels = next((tensors[n].shape[0] for n in ("conv2.weight", "post_quant_conv.weight") if n in tensors), None)
    if channels not in (None, WAN_21.channels):
        kind = "the VAE of Wan 2.2 5B" if channels == 48 else "another VAE"
        raise CheckpointError(
            f"this is {kind}, with {channels} latent channels. The causal models here need the Wan 2.1 VAE, with "
            f"{WAN_21.channels}."
        )
    encoder, decoder = (tensors[name].shape[0] // _MIDDLE_WIDTH for name in marks)
    return {"base_dim": encoder} | ({"decoder_base_dim": decoder} if decoder != encoder else {})


def _check_statistics(config: dict) -> None:
    """A folder's config.json may name other statistics than those that LATENT has in ComfyUI."""
    for name, known in (("latents_mean", LATENTS_MEAN), ("latents_std", LATENTS_STD)):
        given = config.get(name) or known
        if not isinstance(given, (list, tuple)) or list(given) != list(known):
            said = f"[{', '.join(map(shown, given[:4]))}, …]" if isinstance(given, list) else shown(given)
            raise CheckpointError(
                f"its {name} in config.json is not that of Wan 2.1, which the models here are trained on: "
                f"{said}. Use the Wan 2.1 VAE."
            )
