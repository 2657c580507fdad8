"""Where ComfyUI's CONDITIONING and LATENT become the engine's tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import comfy.model_management as mm
import torch

from ..rolling_kv.config import SamplingConfig
from ..rolling_kv.geometry import GEOMETRIES, TEXT_LENGTH, Geometry
from ..rolling_kv.presets import ModelPreset
from ..rolling_kv.sampling.state import CacheState
from ..rolling_kv.vae.latents import to_model, to_raw

if TYPE_CHECKING:
    from .encoding import Encoder

AFTER_CUT = "rolling_kv_after_cut"
"""Key of a CONDITIONING: the embedding of the same text without the marker that begins a shot."""
NAMED = "rolling_kv_named"
"""Key of a CONDITIONING: the text that was encoded, and the embedding that it became; a node may have changed the CONDITIONING's."""

ENCODER = "rolling_kv_encoder"
"""Key of a CONDITIONING: the text encoder that made it, for prompts that come while a run goes on."""


def embedding(conditioning: list, name: str) -> torch.Tensor:
    """The prompt embedding [1, 512, D] of a CONDITIONING. name: of the input. Raises ValueError for several prompts."""
    if len(conditioning) != 1:
        raise ValueError(
            f"The {name} conditioning combines {len(conditioning)} prompts; causal video models read exactly one. Write one "
            "prompt, or chain samplers to use several one after the other."
        )
    embedding = conditioning[0][0]
    missing = TEXT_LENGTH - embedding.shape[1]
    return torch.nn.functional.pad(embedding, (0, 0, 0, missing)) if missing > 0 else embedding


def after_cut(conditioning: list, preset: ModelPreset) -> torch.Tensor | None:
    """What a shot goes on with whose first chunk has this CONDITIONING, [1, 512, D]; None where it begins no shot.

    Encode Prompt leaves it there for a text with a marker; families whose prompts have none do not read it.
    """
    _, *notes = conditioning[0]
    return notes[0].get(AFTER_CUT) if preset.cut_marker and notes else None


def texts_in(*conditionings: list | None) -> Iterator[tuple[str, torch.Tensor]]:
    """What was encoded, as far as the CONDITIONINGs tell: texts with their embeddings, for `CacheState.named`.

    Encode Prompt leaves it there; CLIP Text Encode does not.
    """
    for _, *notes in (part for conditioning in conditionings if conditioning for part in conditioning):
        if notes and NAMED in notes[0]:
            text, embedding = notes[0][NAMED]
            yield from ((text, made) for made in (embedding, notes[0].get(AFTER_CUT)) if made is not None)


def spoken(conditioning: list) -> tuple[str, Encoder] | None:
    """The text whose embedding a CONDITIONING still is, and the encoder that made it; None where no text says it."""
    embedding, *notes = conditioning[0]
    if not notes or not {NAMED, ENCODER} <= notes[0].keys():
        return None
    text, encoded = notes[0][NAMED]
    return (text, notes[0][ENCODER]) if embedding is encoded or torch.equal(embedding, encoded) else None


class Start(NamedTuple):
    """Where a run starts: videos side by side, latent frames before the first chunk, height and width in pixels."""

    batch: int
    frames: int
    height: int
    width: int


def start_of(
    initial_latent: dict | None,
    state: CacheState | None,
    geometry: Geometry,
    sampling: SamplingConfig,
    height: int,
    width: int,
    batch: int = 1,
    source: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, Start]:
    """The frames to start from in model space, if there are any, and the start that they or a state make.

    height, width, batch: pixels and number of videos that start from nothing. source: what those are made of, [B, C, F, h,
    w]: they then have its size. Raises ValueError for both at once, for latents that are none of the model's, and for a
    batch beside another.
    """
    if initial_latent is not None and state is not None:
        raise ValueError(
            "Both an initial latent and a state are connected. Connect the initial latent to the first sampler of the "
            "chain only, and the state to those that follow."
        )
    given = None if initial_latent is None else initial_latents(initial_latent, geometry)
    before = state.chunks[0] if state is not None else given
    sizing = source if before is None else before
    if sizing is None:
        return None, Start(batch, 0, height, width)
    videos = sizing.shape[0]
    if sizing is source and videos == 1:
        return None, Start(batch, 0, *geometry.pixel_size(*sizing.shape[-2:]))
    if batch not in (1, videos):
        what, repeat = "state", ""
        if state is None:
            what = "source" if sizing is source else "initial latent"
            repeat = ", or repeat the latent with Repeat Latent Batch"
        raise ValueError(
            f"batch_size is {batch}, and the {what} holds {videos} video{'s' * (videos > 1)}: leave batch_size at "
            f"1 to make as many{repeat}."
        )
    if before is None:
        return None, Start(videos, 0, *geometry.pixel_size(*sizing.shape[-2:]))
    frames = state.frames if state is not None else before.shape[2]
    if state is None and sampling.given_inside(frames):
        frames = 0
    return given, Start(before.shape[0], frames, *geometry.pixel_size(*before.shape[-2:]))


def initial_latents(latent: dict, geometry: Geometry) -> torch.Tensor:
    """Frames to start from, [B, C, F, h, w] in model space. Raises ValueError for latents of another kind, or empty ones."""
    _check_pictures(latent, geometry, "initial latent", "frames to start from")
    return to_model(_marked_as_given(latent).float())


def source_latents(latent: dict, geometry: Geometry) -> torch.Tensor:
    """A video to be made anew, [B, C, F, h, w] in model space. Raises ValueError as `initial_latents` does."""
    _check_pictures(latent, geometry, "source", "a video to be made anew")
    return to_model(latent["samples"].float())


def _check_pictures(latent: dict, geometry: Geometry, name: str, what: str) -> None:
    samples = latent["samples"]
    if not _fits(samples, geometry):
        raise ValueError(
            f"The {name} must be a {geometry.name} video latent [batch, {geometry.channels}, frames, height, "
            f"width], got {_described(samples)}. Encode the image or video with Encode Video, or VAE Encode, with the "
            f"{geometry.name} VAE."
        )
    if not samples.any():
        raise ValueError(
            f"The {name} is empty: all of it is zero, which no picture is. Sample Video needs no empty latent: "
            f"leave the input unconnected, or connect {what}, encoded with Encode Video."
        )


def _marked_as_given(latent: dict) -> torch.Tensor:
    """The first frames that a noise mask leaves as they are, as Wan22ImageToVideoLatent marks them; all without a mask."""
    samples, mask = latent["samples"], latent.get("noise_mask")
    if mask is None or mask.ndim != 5 or mask.shape[2] != samples.shape[2]:
        return samples
    noisy = mask.amax(dim=(0, 1, 3, 4)) > 0
    given = int((noisy.cumsum(0) == 0).sum())
    return samples[:, :, :given] if given else samples


def latents_to_decode(latent: dict, geometry: Geometry) -> torch.Tensor:
    """The raw latents [B, C, F, h, w] of a LATENT. Raises ValueError for latents that this VAE does not read."""
    samples = latent["samples"]
    if not _fits(samples, geometry):
        raise ValueError(
            f"This decodes {geometry.name} video latents [batch, {geometry.channels}, frames, height, width], got "
            f"{_described(samples)}. Connect the latent of Sample Video, and the VAE of its model."
        )
    return samples


def check_vae(vae: Geometry, model: Geometry) -> None:
    """Raise ValueError unless a VAE makes the latents of a model."""
    if vae.channels != model.channels:
        raise ValueError(
            f"The VAE is that of {vae.name}, and the model has the latents of {model.name}: load the {model.name} VAE."
        )


def latent_of(state: CacheState) -> dict:
    """The whole video so far as a LATENT."""
    return {"samples": to_raw(state.latents().float()).to(mm.intermediate_device())}


def _described(samples: torch.Tensor) -> str:
    """The shape of latents, and whose they are."""
    owner = GEOMETRIES.get(samples.shape[1]) if samples.ndim == 5 else None
    return f"{list(samples.shape)}" + (f" (of {owner.name})" if owner else "")


def _fits(samples: torch.Tensor, geometry: Geometry) -> bool:
    return samples.ndim == 5 and samples.shape[1] == geometry.channels and 0 not in samples.shape
