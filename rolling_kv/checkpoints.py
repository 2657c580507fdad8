"""Loading a causal Wan model from any layout that its checkpoints come in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from .cache import CacheShape
from .config import ModelPreset, check_size
from .files import Checkpoint, CheckpointError, open_checkpoint, telling
from .layouts import (
    LORA,
    UMT5,
    VAE,
    WAN,
    check_fit,
    choose_dtype,
    dtype_name,
    kind_of,
    load_tensor,
    split_scales,
    stored_dtypes,
    strip_prefixes,
    to_diffusers_names,
)
from .model import CausalModel
from .presets import choose_preset, detect_preset, transformer_metadata
from .weights import check_storage, gguf_types, is_packed, pack_linears, store_float8, unpack, unpacked_shapes

__all__ = ["CheckpointError", "CheckpointInfo", "build_transformer", "inspect_checkpoint", "load_model"]

HEAD_DIM = 128
"""Width of an attention head in every published Wan model; shapes do not tell it."""
LATENT_CHANNELS = 16
"""Of the Wan 2.1 VAE, which the models here share."""

_ADVICE = {
    LORA: "A LoRA changes a model: load the model that it was made for here.",
    UMT5: "Give it where the text encoder is asked for.",
    VAE: "Give it where the VAE is asked for.",
}
_CONFIG_NAMES = {  # settings that shapes do not tell (or, for layers, cannot vouch for), by their names in config files
    "num_attention_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "attention_head_dim": "attention_head_dim",
    "num_layers": "num_layers",
    "eps": "eps",
    "rope_max_seq_len": "rope_max_seq_len",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    layout: naming, wrapper and prefix, for people.
    file_bytes: of all weight files together.
    dtypes: of the stored weights, the one with the most values first; the packings of a GGUF file before the rest.
    config: layers, dim, heads, ffn.
    preset: name of the detected preset, None where neither the file nor its name tells.
    kv_bytes_per_frame: keys and values of one latent frame in bfloat16 at `height` x `width` pixels.
    """

    path: Path
    layout: str
    file_bytes: int
    dtypes: tuple[str, ...]
    config: dict[str, int]
    parameters: int
    preset: str | None
    height: int
    width: int
    kv_bytes_per_frame: int


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
    preset: a preset, the name of one, or "auto": detected, self-forcing where nothing tells.
    runs_on: the device that "auto" chooses for, where the model is loaded to another one first.
    config: settings that shapes cannot tell and the file does not, such as `num_attention_heads`.
    storage: "model" keeps the weights in `dtype`; "float8" keeps the blocks' Linear layers in one byte per value, and
        brings each to `dtype` while it runs.

    Raises CheckpointError for a file that is no such model, with what it is instead, what is missing or what to do.
    """
    path = Path(path)
    with telling(path):
        checkpoint = open_checkpoint(_transformer_path(path))
        chosen = choose_preset(preset, path, checkpoint)
        settings = _settings(checkpoint) | (config or {})
        check_storage(storage, any(map(is_packed, checkpoint.tensors.values())))
        if storage == "model":
            return CausalModel(build_transformer(checkpoint.tensors, settings, dtype, device, runs_on), chosen)
        # In float8 before it moves: the device may be too small for more.
        transformer = build_transformer(checkpoint.tensors, settings, dtype, runs_on=runs_on or device)
        store_float8(transformer)
        return CausalModel(transformer.to(device), chosen)


@torch.inference_mode(False)
def build_transformer(
    state_dict: dict[str, Tensor],
    config: dict | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    runs_on: str | torch.device | None = None,
) -> WanTransformer3DModel:
    """Build the stock diffusers transformer around given weights, in original Wan or diffusers names.

    config: overrides what shapes cannot tell: num_attention_heads (or num_heads), attention_head_dim, num_layers, eps,
        rope_max_seq_len; other entries are ignored. Heads of 128 are assumed.

    Tensors that already have the dtype and device are used as they are, not copied. Raises CheckpointError.
    """
    weights, scales, config, _ = _prepare(state_dict, config or {})
    packed = _packed(state_dict)
    transformer = _empty_transformer(weights, config)
    dtype = choose_dtype(dtype, weights, runs_on or device)
    float32_parts = set(WanTransformer3DModel._keep_in_fp32_modules) if dtype.itemsize < 4 else set()
    weights |= packed
    loaded = {name: weights.pop(name).to(device) for name in pack_linears(transformer, packed, dtype, float32_parts)}
    for name in list(weights):
        target = torch.float32 if float32_parts.intersection(name.split(".")) else dtype
        loaded[name] = load_tensor(unpack(weights.pop(name)), scales.get(name), target, device)
    transformer.load_state_dict(loaded, assign=True)
    # Its tables are no part of any checkpoint, and are still on the meta device.
    rope = WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], transformer.config.rope_max_seq_len)
    transformer.rope = rope.to(device)
    return transformer.eval().requires_grad_(False)


def inspect_checkpoint(path: str | Path, height: int = 480, width: int = 832) -> CheckpointInfo:
    """Tell what a checkpoint is, from names and shapes alone. Raises CheckpointError as `load_model` does."""
    path = Path(path)
    with telling(path):
        checkpoint = open_checkpoint(_transformer_path(path), values=False)
        weights, _, config, naming = _prepare(checkpoint.tensors, _settings(checkpoint))
        transformer = _empty_transformer(weights, config)
        preset = detect_preset(path, checkpoint)
    packings = gguf_types(checkpoint.tensors)
    shape = CacheShape.of(transformer, 1, *check_size(height, width), torch.bfloat16)
    return CheckpointInfo(
        path=path,
        layout=", ".join(filter(None, (naming, checkpoint.wrapper and f"wrapper {checkpoint.wrapper}"))),
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        dtypes=(*packings, *map(dtype_name, stored_dtypes(checkpoint.tensors if packings else weights))),
        config={
            "layers": config["num_layers"],
            "dim": shape.heads * shape.head_dim,
            "heads": config["num_attention_heads"],
            "ffn": config["ffn_dim"],
        },
        parameters=sum(weight.numel() for weight in weights.values()),
        preset=preset and preset.name,
        height=height,
        width=width,
        kv_bytes_per_frame=shape.bytes_per_frame(),
    )


def _transformer_path(path: Path) -> Path:
    return path / "transformer" if (path / "transformer").is_dir() else path


def _settings(checkpoint: Checkpoint) -> dict:
    return checkpoint.config | transformer_metadata(checkpoint)


def _prepare(tensors: dict[str, Tensor], settings: dict) -> tuple[dict[str, Tensor], dict[str, Tensor], dict, str]:
    """Weights in diffusers' names, float8 scales, the model's config and the naming they had."""
    stripped, prefix = strip_prefixes(unpacked_shapes(tensors))
    kind = kind_of(stripped)
    if kind != WAN:
        raise CheckpointError(f"this is {kind}, not a Wan video model. {_ADVICE.get(kind, '')}".rstrip())
    renamed, naming = to_diffusers_names(stripped)
    weights, scales = split_scales(renamed)
    return weights, scales, _config(weights, settings), f"{naming}, prefix {prefix}." if prefix else naming


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that a GGUF file packs, under diffusers' names."""
    packed = {name: tensor for name, tensor in tensors.items() if is_packed(tensor)}
    return to_diffusers_names(strip_prefixes(packed)[0])[0] if packed else {}


def _config(weights: dict[str, Tensor], settings: dict) -> dict:
    def shape(name: str, dims: int = 2) -> list[int]:
        if name not in weights:
            raise CheckpointError(f"{name} is missing. The file is incomplete, or not a Wan 2.1 text-to-video model.")
        size = list(weights[name].shape)
        if len(size) != dims:
            raise CheckpointError(f"{name} has the shape {size}; a Wan model has {dims} dimensions there.")
        return size

    dim, channels, *patch = shape("patch_embedding.weight", 5)
    out_channels = shape("proj_out.weight")[0] // math.prod(patch)
    if out_channels == 48:
        raise CheckpointError(
            f"this is the Wan 2.2 5B model (dim {dim}, {channels} latent channels), which belongs to another VAE. The "
            f"causal models here have {LATENT_CHANNELS} latent channels (Wan 2.1, 1.3B or 14B)."
        )
    if channels != LATENT_CHANNELS or any("image_embedder" in name for name in weights):
        raise CheckpointError(
            f"this is an image-conditioned Wan model ({channels} input channels instead of {LATENT_CHANNELS}, or an "
            "image encoder's projection). Use a causal text-to-video model: it also continues a given image."
        )
    ffn_dim = shape("blocks.0.ffn.net.0.proj.weight")[0]
    text_dim = shape("condition_embedder.text_embedder.linear_1.weight")[1]
    freq_dim = shape("condition_embedder.time_embedder.linear_1.weight")[1]
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in weights)
    config = {
        "patch_size": tuple(patch),
        "in_channels": channels,
        "out_channels": out_channels,
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": 1 + max(int(number[1]) for number in numbers if number),
        "cross_attn_norm": "blocks.0.norm2.weight" in weights,
    }
    given = {_CONFIG_NAMES[name]: value for name, value in settings.items() if name in _CONFIG_NAMES}
    return config | given | _heads(dim, given)


def _heads(dim: int, given: dict) -> dict:
    head_dim = given.get("attention_head_dim") or HEAD_DIM
    heads = given.get("num_attention_heads") or dim // head_dim
    if "attention_head_dim" not in given and "num_attention_heads" in given:
        head_dim = dim // heads
    if heads * head_dim != dim or not heads:
        raise CheckpointError(
            f"the width of this model is {dim}, which is not {heads or 'any number of'} heads of {head_dim}. A model "
            "with other heads has to say how many: `num_attention_heads` in its config.json, or in the config argument."
        )
    return {"num_attention_heads": heads, "attention_head_dim": head_dim}


def _empty_transformer(weights: dict[str, Tensor], config: dict) -> WanTransformer3DModel:
    """The model on the meta device; raises CheckpointError unless the weights are exactly those it needs."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**config)
    model = f"a Wan text-to-video model of {config['num_layers']} layers (in diffusers' names)"
    check_fit(weights, transformer.state_dict(), model)
    return transformer
