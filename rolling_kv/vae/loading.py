"""A file or folder, in whichever layout users have, and the VAE that is in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from ..checkpoints.dtypes import check_floating, choose_dtype
from ..checkpoints.fingerprint import check_finite
from ..checkpoints.float8 import load_tensor
from ..checkpoints.gguf import unpack
from ..checkpoints.names import VAE, check_fit, kind_of, strip_prefixes
from ..checkpoints.readers import CheckpointError, known_fields, open_checkpoint, telling
from ..config import check_flag, check_real, check_whole
from ..geometry import GEOMETRIES, WAN_21, WAN_22, Geometry
from ..messages import printable, shown
from .latents import STATISTICS
from .taehv import TinyVAE, is_taehv, taehv_of
from .wan import WanVAE, streamline

logger = logging.getLogger(__name__)

AnyVAE = WanVAE | TinyVAE
"""What decodes raw latents."""

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
) -> AnyVAE:
    """Load a Wan VAE of any width, or a tiny decoder, from local files only.

    path: a diffusers folder (the VAE's own, or a pipeline with vae/ in it), or a single .safetensors or .pth file in
        the original Wan or the diffusers names; or a file of TAEHV's, taew2_1 or taew2_2.
    dtype: "float32", "float16", "bfloat16", a torch dtype, or "auto": the file's own, on CUDA float32 as bfloat16, and
        float32 on hardware without bfloat16: float16 is too small for it, but not for a tiny decoder.
    runs_on: the device that "auto" chooses for, where the VAE is loaded to another one first.
    geometry: of the model whose latents it is for; None takes either VAE.
    Raises CheckpointError, a ValueError, when the path is missing, unreadable, or not the VAE of such a model.
    """
    path = Path(path)
    with telling(path):
        checkpoint = open_checkpoint(path / "vae" if (path / "vae").is_dir() else path)
        if is_taehv(checkpoint.tensors):
            logger.warning(
                "%s is a tiny decoder: its pictures are near those of the Wan VAE, and not the same",
                printable(path.name),
            )
            return TinyVAE(taehv_of(path.name, checkpoint.tensors, geometry, device, dtype=dtype, runs_on=runs_on))
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
        vae.load_state_dict(loaded, assign=True)
    streamline(vae)
    return WanVAE(vae).eval().requires_grad_(False)


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
