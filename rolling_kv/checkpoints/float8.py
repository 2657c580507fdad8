"""Weights in float8: the scales of scaled files, and which layers of a model are kept so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from ..float8_linear import FLOAT8, Float8Linear
from ..messages import shortened
from .dtypes import check_floating
from .gguf import is_packed, plain
from .readers import CheckpointError


def store_float8(transformer: WanTransformer3DModel, scales: Mapping[str, Tensor] | None = None) -> None:
    """Keep the Linear layers of the blocks in float8_e4m3fn, one byte per value.

    scales: of weights that are float8 already, by the name of the weight.

    Embeddings, norms, modulation and the output projection are left alone.
    """
    for name, layer in list(transformer.blocks.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, last = name.rpartition(".")
            scale = (scales or {}).get(f"blocks.{name}.weight")
            setattr(transformer.blocks.get_submodule(parent), last, Float8Linear.of(layer, scale))


def kept_scales(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the scales that a `Float8Linear` keeps beside its weight as a file has it, float32 [1, 1] or [out, 1]."""
    kept = {}
    for name, scale in scales.items():
        weight = weights.get(name) if name.startswith("blocks.") else None
        if weight is not None and weight.dtype == FLOAT8 and weight.ndim == 2:
            if scale.numel() == 1 or tuple(scale.shape) == (len(weight), 1):
                kept[name] = scale.float().reshape(-1, 1)
    return kept


def split_scales(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the scales of float8 weights by the name of the weight they belong to.

    Marks that matter only to arithmetic in float8 (`scaled_fp8`, scales of inputs) are dropped.
    """
    weights, scales = {}, {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale"):
            scales[f"{owner}.weight"] = tensor
        elif last not in ("scaled_fp8", "scale_input", "input_scale", "comfy_quant"):
            weights[name] = tensor
    check_floating(weights)
    for name, scale in scales.items():
        if name in weights and not _fits(scale, weights[name]):
            raise CheckpointError(
                f"the scale of {shortened(name)} has the shape {list(scale.shape)[:8]}, which does not go with the "
                f"weight's {list(weights[name].shape)[:8]}."
            )
    return weights, scales


def _fits(scale: Tensor, weight: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(scale.shape, weight.shape) == weight.shape
    except RuntimeError:
        return False


def load_tensor(
    tensor: Tensor, scale: Tensor | None, dtype: torch.dtype, device: torch.device | str, *, copy: bool = True
) -> Tensor:
    """The tensor in `dtype` on `device`, with the scale of a float8 weight multiplied in.

    copy: make a copy where there is nothing to change, too, so that nothing stays mapped to a file that somebody may
        change. A packed tensor stays as it is packed.
    """
    if is_packed(tensor):
        return type(tensor)(plain(tensor).to(device, copy=copy), quant_type=tensor.quant_type)
    if scale is None:
        return tensor.to(device, dtype, copy=copy)
    return (tensor.to(device, torch.float32) * scale.to(device, torch.float32)).to(dtype)
