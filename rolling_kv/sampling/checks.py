"""Whether latents and prompts that come in fit a model."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from ..checkpoints.model import CausalModel
from ..config import CacheConfig, SamplingConfig
from .state import Seeds

LONG_SINK_FRAMES = 120
"""Latent frames, half a minute, up to which a sink at absolute positions is no worry."""


def fitted_embeds(model: CausalModel, batch: int, embeds: torch.Tensor, name: str) -> torch.Tensor:
    """Text embeddings [B or 1, L, D] as a session of `batch` videos takes them: on the CPU, [B, L, D], the model's dtype.

    name: what to call them in a message. Raises ValueError unless they are of the model's width.
    """
    text_dim = model.config.text_dim
    if embeds.ndim != 3 or embeds.shape[0] not in (1, batch) or embeds.shape[2] != text_dim:
        raise ValueError(
            f"{name} must be [1 or {batch}, tokens, {text_dim}] for this model, got {list(embeds.shape)}; "
            "was it made by a text encoder of another model?"
        )
    return embeds.to("cpu", model.dtype).expand(batch, -1, -1)


def check_latents(
    model: CausalModel, batch: int, latent_size: tuple[int, int], latents: torch.Tensor, name: str
) -> None:
    """Raise ValueError unless latents are [B, C, F, h, w] of the model's channels and that size.

    name: what to call them in the message.
    """
    geometry = model.geometry
    expected = (batch, geometry.channels, *latent_size)
    if latents.ndim != 5 or (*latents.shape[:2], *latents.shape[3:]) != expected:
        raise ValueError(
            f"{name} must be [batch {expected[0]}, channels {expected[1]}, frames, height {expected[2]}, "
            f"width {expected[3]}] (in latents, {geometry.spatial} pixels each), got {list(latents.shape)}"
        )


def check_source_length(source: torch.Tensor, chunks: int, sampling: SamplingConfig, start: int) -> None:
    """Raise ValueError unless latents to start from, [B, C, F, h, w], are as long as that many chunks from frame `start` on."""
    needed = sampling.frames_of(chunks, start)
    if source.shape[2] < needed:
        raise ValueError(
            f"the latents to start from are {source.shape[2]} frames, and {chunks} chunks are {needed}: make fewer "
            "chunks, or give more frames"
        )


def checked_seeds(seed: int | Sequence[int], batch: int) -> Seeds:
    """Seeds as the log has them: a batch of one has one. Raises ValueError unless a sequence has one for each video."""
    if not isinstance(seed, Sequence):
        return seed
    if len(seed) != batch:
        raise ValueError(f"there must be one seed for each of the {batch} videos, or one for all, got {len(seed)}")
    return tuple(map(operator.index, seed)) if batch > 1 else seed[0]


def size_note(model: CausalModel, height: int, width: int) -> str:
    """What is to be said of videos of that size in pixels by a model that makes one size only; empty where it is nothing."""
    if model.only_size in (None, (height, width)):
        return ""
    own_height, own_width = model.only_size
    own = f"{own_width}x{own_height}"
    return (
        f"This model knows pictures of {own} pixels alone. At {width}x{height} it may show several things at once, or none: make "
        f"{own}, and have the video enlarged (enlarge, on the command line --scale)."
    )


def long_sink_note(sampling: SamplingConfig, cache: CacheConfig, frames: int) -> str:
    """What is known of a video of `frames` latent frames under these rules, as a sentence; empty where it is nothing."""
    grows = cache.positions == "absolute" and cache.context == "kept" and not sampling.joint and not cache.unlimited
    if not grows or not cache.sink or frames <= LONG_SINK_FRAMES:
        return ""
    return (
        f"This video has {frames} latent frames, and its sink stays where it was made: after about 130, such videos are "
        'known to snap back to their first picture. Choose "window" positions for it.'
    )
