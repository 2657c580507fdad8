"""Building the stock diffusers transformer around given weights."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from ..config import check_real, check_whole
from ..geometry import GEOMETRIES, WAN_21
from .detect import transformer_metadata
from .dtypes import choose_dtype
from .fingerprint import check_finite
from .float8 import kept_scales, load_tensor, split_scales, store_float8
from .gguf import is_packed, pack_linears, unpack, unpacked_shapes
from .names import (
    LORA,
    MOST_LAYERS,
    UMT5,
    VAE,
    WAN,
    check_fit,
    count_layers,
    kind_of,
    strip_prefixes,
    to_diffusers_names,
)
from .readers import Checkpoint, CheckpointError, known_fields

HEAD_DIM = 128
"""Width of an attention head in every published Wan model; shapes do not tell it."""
_ADVICE = {
    LORA: "A LoRA changes a model: load the model that it was made for here.",
    UMT5: "Give it where the text encoder is asked for.",
    VAE: "Give it where the VAE is asked for.",
}
_CONFIG_NAMES = {"num_heads": "num_attention_heads"}  # what config files call a setting, where it has another name
_CHECKS = {  # settings that shapes do not tell (or, for layers, cannot vouch for)
    "num_attention_heads": partial(check_whole, low=1, high=1024),
    "attention_head_dim": partial(check_whole, low=2, high=1024),
    "num_layers": partial(check_whole, low=1, high=MOST_LAYERS),
    "eps": partial(check_real, low=0, high=1),
    "rope_max_seq_len": partial(check_whole, low=1, high=2**15),
}


@torch.inference_mode(False)
def build_transformer(
    state_dict: dict[str, Tensor],
    config: dict | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    runs_on: str | torch.device | None = None,
    *,
    copy: bool = False,
    float8: bool = False,
) -> WanTransformer3DModel:
    """Build the stock diffusers transformer around given weights, in original Wan or diffusers names.

    config: overrides what shapes cannot tell: num_attention_heads (or num_heads), attention_head_dim, num_layers, eps,
        rope_max_seq_len; other entries are ignored. Heads of 128 are assumed.

    copy: whether the model has tensors of its own throughout, as those that are mapped from a file ask for. Else those
        that already have the dtype and device are used as they are.
    float8: keep the blocks' Linear layers in float8, each narrowed as soon as it is read: see `store_float8`. Those that a
        file has in float8 with a scale stay as they are.

    Raises CheckpointError.
    """
    weights, scales, config, _ = prepare(state_dict, config or {})
    packed = _packed(state_dict)
    transformer = empty_transformer(weights, config)
    dtype = choose_dtype(dtype, weights, runs_on or device)
    kept = {}
    if float8:
        kept = kept_scales(weights, scales)
        store_float8(transformer, kept)
    narrow = {name for name, tensor in transformer.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    float32_parts = set(WanTransformer3DModel._keep_in_fp32_modules) if dtype.itemsize < 4 else set()
    weights |= packed
    stay_packed = pack_linears(transformer, packed, dtype, float32_parts)
    loaded = {name: load_tensor(weights.pop(name), None, dtype, device, copy=copy) for name in stay_packed}
    loaded |= {f"{name.removesuffix('weight')}scale": scale.to(device) for name, scale in kept.items()}
    for name in list(weights):
        target = torch.float32 if float32_parts.intersection(name.split(".")) else dtype
        scale = None if name in kept else scales.get(name)
        tensor = load_tensor(unpack(weights.pop(name)), scale, target, device, copy=copy)
        if name in narrow:
            check_finite({name: tensor})
            tensor = tensor.to(torch.float8_e4m3fn)
        loaded[name] = tensor
    check_finite({name: tensor for name, tensor in loaded.items() if name not in narrow})
    transformer.load_state_dict(loaded, assign=True)
    # Its tables are no part of any checkpoint, and are still on the meta device.
    rope = WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], transformer.config["rope_max_seq_len"])
    transformer.rope = rope.to(device)
    return transformer.eval().requires_grad_(False)


def transformer_path(path: Path) -> Path:
    return path / "transformer" if (path / "transformer").is_dir() else path


def settings_of(checkpoint: Checkpoint) -> dict:
    return checkpoint.config | transformer_metadata(checkpoint)


def prepare(tensors: dict[str, Tensor], settings: dict) -> tuple[dict[str, Tensor], dict[str, Tensor], dict, str]:
    """Weights in diffusers' names, float8 scales, the model's config and the naming they had."""
    stripped, prefix = strip_prefixes(unpacked_shapes(tensors))
    kind = kind_of(stripped)
    if kind != WAN:
        raise CheckpointError(f"this is {kind}, not a Wan video model. {_ADVICE.get(kind, '')}".rstrip())
    if any(name.endswith("quantized_weight_values") for name in stripped):
        raise CheckpointError(
            "its weights are packed as NVFP4 for FourOverSix, which is not read here. Use the model in bfloat16: of "
            "LongLive 2 that is model_bf16.pt, or model_te.pt."
        )
    renamed, naming = to_diffusers_names(stripped)
    weights, scales = split_scales(_unfolded(renamed))
    return weights, scales, _config(weights, settings), f"{naming}, prefix {prefix}." if prefix else naming


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that a GGUF file packs, under diffusers' names."""
    packed = {name: tensor for name, tensor in tensors.items() if is_packed(tensor)}
    return to_diffusers_names(strip_prefixes(packed)[0])[0] if packed else {}


def _unfolded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with the dimensions that GGUF has no room for: its converters fold the first two into one."""
    patch, bias = (weights.get(f"patch_embedding.{part}") for part in ("weight", "bias"))
    if patch is None or bias is None or patch.ndim != 4 or not bias.numel() or len(patch) % bias.numel():
        return weights
    return weights | {"patch_embedding.weight": patch.unflatten(0, (bias.numel(), -1))}


def _config(weights: dict[str, Tensor], settings: dict) -> dict:
    def shape(name: str, dims: int = 2) -> list[int]:
        if name not in weights:
            raise CheckpointError(f"{name} is missing. The file is incomplete, or not a Wan text-to-video model.")
        size = list(weights[name].shape)
        if len(size) != dims:
            raise CheckpointError(f"{name} has the shape {size}; a Wan model has {dims} dimensions there.")
        return size

    dim, channels, *patch = shape("patch_embedding.weight", 5)
    if tuple(patch) != WAN_21.patch:
        raise CheckpointError(f"this model has patches of {patch}; those of a Wan model are {list(WAN_21.patch)}.")
    out_channels = shape("proj_out.weight")[0] // math.prod(patch)
    if out_channels not in GEOMETRIES:
        known = " or ".join(f"{channels} ({geometry.name})" for channels, geometry in GEOMETRIES.items())
        raise CheckpointError(f"this model's latents have {out_channels} channels; those of a Wan model have {known}.")
    if channels != out_channels or any("image_embedder" in name for name in weights):
        raise CheckpointError(
            f"this is an image-conditioned Wan model ({channels} input channels instead of {out_channels}, or an "
            "image encoder's projection). Use a causal text-to-video model: it also continues a given image."
        )
    ffn_dim = shape("blocks.0.ffn.net.0.proj.weight")[0]
    text_dim = shape("condition_embedder.text_embedder.linear_1.weight")[1]
    freq_dim = shape("condition_embedder.time_embedder.linear_1.weight")[1]
    given = _renamed(settings)
    config = {
        "patch_size": tuple(patch),
        "in_channels": channels,
        "out_channels": out_channels,
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": count_layers(weights, r"blocks\."),
        "cross_attn_norm": "blocks.0.norm2.weight" in weights,
    }
    return config | given | _heads(dim, given)


def _renamed(settings: dict) -> dict:
    return known_fields({_CONFIG_NAMES.get(name, name): value for name, value in settings.items()}, _CHECKS)


def _heads(dim: int, given: dict) -> dict:
    head_dim = given.get("attention_head_dim", HEAD_DIM)
    heads = given.get("num_attention_heads", dim // head_dim)
    if "attention_head_dim" not in given and "num_attention_heads" in given:
        head_dim = dim // heads
    if heads * head_dim != dim or not heads:
        raise CheckpointError(
            f"the width of this model is {dim}, which is not {heads or 'any number of'} heads of {head_dim}. A model "
            "with other heads has to say how many: `num_attention_heads` in its config.json, or in the config argument."
        )
    if head_dim % 2:
        raise CheckpointError(f"heads of {head_dim} have no pairs of values that positions could rotate.")
    return {"num_attention_heads": heads, "attention_head_dim": head_dim}


def empty_transformer(weights: dict[str, Tensor], config: dict) -> WanTransformer3DModel:
    """The model on the meta device; raises CheckpointError unless the weights are exactly those it needs."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**config)
    model = f"a Wan text-to-video model of {config['num_layers']} layers (in diffusers' names)"
    check_fit(weights, transformer.state_dict(), model)
    return transformer
