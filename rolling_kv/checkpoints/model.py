"""A loaded causal video model, and loading one from any layout that its checkpoints come in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ..config import ExecutionConfig
from ..geometry import Geometry
from ..messages import printable
from ..presets import DEFAULT_PRESET, ModelPreset
from .detect import assumption, choose_preset, only_size
from .dtypes import slow_dtype
from .fingerprint import fingerprint
from .gguf import gguf_types
from .names import split_context
from .readers import CheckpointError, open_checkpoint, telling
from .transformer import build_transformer, settings_of, transformer_path

logger = logging.getLogger(__name__)


class CausalModel(nn.Module):
    """A holder of one transformer. It has no `device` attribute, so that a memory manager may assign one.

    transformer: the stock diffusers model.
    context_transformer: the one that makes the passes that write the cache, where it has weights of its own (Self
        Gradient Forcing Plus); None where the transformer makes them too.
    preset: the sampling and cache settings that the weights were trained for.
    note: what was assumed of a checkpoint that does not tell whether it is causal, and how to choose; empty otherwise.
    only_size: height and width in pixels of the only videos that it makes; None for a model that makes others too.
    identity: 16 hex digits that tell these weights from others, the same for every file layout they are read from.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        preset: ModelPreset = DEFAULT_PRESET,
        note: str = "",
        context_transformer: WanTransformer3DModel | None = None,
        only_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.transformer = transformer
        self.context_transformer = context_transformer
        self.preset = preset
        self.note = note
        self.only_size = only_size
        about = {"heads": self.config.num_attention_heads, "patch": list(self.config.patch_size)}
        weights = transformer.state_dict()
        if context_transformer is not None:
            weights |= {f"context.{name}": weight for name, weight in context_transformer.state_dict().items()}
        self.identity = fingerprint(weights, about)
        self.train(transformer.training)

    @property
    def transformers(self) -> tuple[WanTransformer3DModel, ...]:
        """Both sets of weights, or the only one. The prompt's keys and values are each set's own."""
        return (self.transformer,) if self.context_transformer is None else (self.transformer, self.context_transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model computes in; norms and time embedding may be kept in float32."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def config(self) -> Any:
        """The transformer's settings, by diffusers' names."""
        return self.transformer.config

    @property
    def geometry(self) -> Geometry:
        """How pixels, latents, tokens and seconds follow from each other for this model."""
        return Geometry.of(self.transformer)

    def compute_device(self) -> torch.device:
        """Where the weights are now."""
        return self.transformer.patch_embedding.weight.device


@torch.inference_mode(False)
def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    preset: str | ModelPreset = "auto",
    device: str | torch.device = "cpu",
    runs_on: str | torch.device | None = None,
    config: dict | None = None,
    storage: str = "model",
) -> CausalModel:
    """Load a causal Wan text-to-video model.

    path: a diffusers folder (with transformer/ in it, or that folder itself), or a .safetensors, .gguf, .pt or .pth
        file in the original Wan or diffusers names, inside the usual wrappers and prefixes. The weights of a .gguf file
        stay packed in memory.
    dtype: "float32", "float16", "bfloat16", a torch dtype, or "auto": the file's own, float8 as bfloat16, and on CUDA
        float32 as bfloat16. In half precision the norms and the time embedding stay float32, as diffusers does.
    preset: a preset, the name of one, or "auto": detected, self-forcing where nothing tells. The log then says so, and
        `CausalModel.note`.
    runs_on: the device that "auto" chooses for, where the model is loaded to another one first.
    config: settings that shapes cannot tell and the file does not, such as `num_attention_heads`.
    storage: "model" keeps the weights in `dtype`; "float8" keeps the blocks' Linear layers in one byte per value, and
        brings each to `dtype` while it runs.

    Raises CheckpointError for a file that is no such model, with what it is instead, what is missing or what to do.
    """
    path = Path(path)
    with telling(path):
        checkpoint = open_checkpoint(transformer_path(path))
        chosen = choose_preset(preset, path, checkpoint)
        note = assumption(path, checkpoint) if preset == "auto" else ""
        settings = settings_of(checkpoint) | (config or {})
        ExecutionConfig().check(weight_storage=storage, packings=gguf_types(checkpoint.tensors))

        weights, context_weights = split_context(checkpoint.tensors)
        place = {"device": device, "runs_on": runs_on, "storage": storage}
        transformer = _built(weights, settings, dtype, **place)
        context_transformer = _built_context(context_weights, transformer, settings, dtype, **place)
    model = CausalModel(transformer, chosen, note, context_transformer, only_size(path))
    for text in filter(None, (note, slow_dtype(dtype, model.dtype, runs_on or device))):
        logger.warning("%s: %s", printable(path.name), text)
    return model


def _built(weights: dict, settings: dict, dtype, *, device, runs_on, storage: str) -> WanTransformer3DModel:
    return build_transformer(weights, settings, dtype, device, runs_on, copy=True, float8=storage == "float8")


def _built_context(
    weights: dict, transformer: WanTransformer3DModel, settings: dict, dtype, **place
) -> WanTransformer3DModel | None:
    """The transformer of a second set of weights, None for an empty one."""
    if not weights:
        return None
    which = "its second set of weights, for context passes"
    try:
        made = _built(weights, settings, dtype, **place)
    except CheckpointError as error:
        raise CheckpointError(f"{which}: {error}") from error
    if made.config != transformer.config:
        layers = len(made.blocks), len(transformer.blocks)
        raise CheckpointError(
            f"{which}, makes another model than the first ({layers[0]} layers, {layers[1]} in the first). The file is "
            "incomplete: download it again."
        )
    return made
