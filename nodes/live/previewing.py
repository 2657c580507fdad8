"""How Sample Video's latents become pictures: by the VAE that is connected, by a tiny decoder, or by a linear map."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
import torch
from comfy import latent_formats

from ...rolling_kv.geometry import WAN_21, WAN_22, Geometry
from ...rolling_kv.messages import printable
from ...rolling_kv.previews import DecodedPreview, LinearPreview, load_fitted
from ...rolling_kv.vae.taehv import load_taehv
from ..types import ModelHandle
from .runs import Preview

logger = logging.getLogger(__name__)

FORMATS = {WAN_21.channels: latent_formats.Wan21, WAN_22.channels: latent_formats.Wan22}
"""ComfyUI's latents, whose numbers are for normalised ones, as the model's are."""
TINY_DECODERS = {WAN_21.channels: ("taew2_1", "lighttaew2_1"), WAN_22.channels: ("taew2_2", "lighttaew2_2")}
"""Files in models/vae_approx, without their endings."""


def preview_of(model: ModelHandle, vae) -> Preview:
    """What makes pictures of the latents of a model. vae: the one that is connected, on the device; None without one.

    A file that cannot be used, for whatever reason, is told of and left out: no preview is worth a run.
    """
    if vae is not None:
        return DecodedPreview(vae.model.decoder, vae.model.compute_device())
    return _fitted(model) or _tiny_decoder(model.geometry, model.patcher.load_device) or _linear(model.geometry)


def _fitted(model: ModelHandle) -> Preview | None:
    """The map that lies beside the model's own VAE."""
    try:
        return None if model.path is None else load_fitted(model.path)
    except Exception as error:
        logger.warning("%s", printable(str(error)))
        return None


def _tiny_decoder(geometry: Geometry, device: torch.device) -> Preview | None:
    for name in folder_paths.get_filename_list("vae_approx"):
        if Path(name).stem in TINY_DECODERS[geometry.channels]:
            try:
                # A link that leads nowhere is listed, too.
                path = Path(folder_paths.get_full_path_or_raise("vae_approx", name))
                taehv = load_taehv(path, geometry, device)
            except Exception as error:
                logger.warning("the preview is made without a tiny decoder: %s", printable(str(error)))
            else:
                return DecodedPreview(taehv.stream, device, raw=taehv.raw)
    return None


def _linear(geometry: Geometry) -> Preview:
    known = FORMATS[geometry.channels]
    return LinearPreview(known.latent_rgb_factors, known.latent_rgb_factors_bias)
