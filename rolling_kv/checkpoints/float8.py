"""Weights in float8: the scales of scaled files, and storage through diffusers' layerwise casting."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from .dtypes import dtype_name
from .readers import CheckpointError


def store_float8(transformer: WanTransformer3DModel) -> None:
    """Keep the Linear layers of the blocks in float8_e4m3fn, one byte per value; the compute dtype stays what it is.

    Embeddings, norms, modulation and the output projection are left alone (diffusers' own skip patterns).
    """
    transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.patch_embedding.weight.dtype
    )


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
    strange = [name for name, tensor in weights.items() if not tensor.is_floating_point()]
    if strange:
        raise CheckpointError(
            f"the weights are quantised in a way that is not read here: {strange[0]} is "
            f"{dtype_name(weights[strange[0]].dtype)}. Use the bf16, fp16 or fp8 version."
        )
    return weights, scales


def load_tensor(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The tensor in `dtype` on `device`, with the scale of a float8 weight multiplied in."""
    if scale is None:
        return tensor.to(device, dtype)
    return (tensor.to(device, torch.float32) * scale.to(device, torch.float32)).to(dtype)
