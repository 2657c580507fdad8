"""How Sample Video's latents become pictures: by the VAE that is connected, or by a linear map."""

from __future__ import annotations

from comfy import latent_formats

from ...rolling_kv.geometry import WAN_21, WAN_22
from ...rolling_kv.previews import DecodedPreview, LinearPreview, load_fitted
from ..types import ModelHandle
from .runs import Preview

FORMATS = {WAN_21.channels: latent_formats.Wan21, WAN_22.channels: latent_formats.Wan22}


def preview_of(model: ModelHandle, vae) -> Preview:
    """What makes pictures of the latents of a model. vae: the one that is connected, on the device; None without one."""
    if vae is not None:
        return DecodedPreview(vae.model.decoder, vae.model.compute_device())
    fitted = None if model.path is None else load_fitted(model.path)
    return fitted or linear_preview(model.geometry.channels)


def linear_preview(channels: int) -> LinearPreview:
    """ComfyUI's numbers for the latents of that many channels, which are normalised as the model's are."""
    known = FORMATS[channels]
    return LinearPreview(known.latent_rgb_factors, known.latent_rgb_factors_bias)
