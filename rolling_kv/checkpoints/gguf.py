"""Weights packed in GGUF files, unpacked by diffusers' quantiser while a layer runs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers.utils import is_gguf_available
from torch import Tensor, nn

GGUF_PACKAGE = "gguf>=0.13"


def is_packed(tensor: Tensor) -> bool:
    """Whether the tensor is a `GGUFParameter`: bytes, which unpack to the shape `quant_shape`."""
    return hasattr(tensor, "quant_type")


def read_gguf(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file under its own names, mapped from disk; packed ones as diffusers' `GGUFParameter`.

    Raises ImportError without the package gguf, NotImplementedError for a packing that diffusers does not unpack, and
    whatever the package raises for a file that is none or is damaged.
    """
    if not is_gguf_available():
        raise ImportError(f'reading GGUF files needs the Python package gguf. Install it: pip install "{GGUF_PACKAGE}"')
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType, GGUFReader

    tensors = {}
    for entry in GGUFReader(path, mode="c").tensors:  # copy on write: the values are read when they are used
        kind = entry.tensor_type
        data = torch.from_numpy(entry.data)
        if kind == GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        elif kind in SUPPORTED_GGUF_QUANT_TYPES:
            data = GGUFParameter(data, quant_type=kind)
        elif kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            raise NotImplementedError(f"{entry.name} is packed as {kind.name}, which diffusers does not unpack.")
        tensors[entry.name] = data
    return tensors


def gguf_types(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the packings (Q8_0, Q4_K, …), the one with the most values first; empty when nothing is packed."""
    sizes: dict[str, int] = {}
    for tensor in filter(is_packed, tensors.values()):
        sizes[tensor.quant_type.name] = sizes.get(tensor.quant_type.name, 0) + tensor.numel()
    return sorted(sizes, key=sizes.get, reverse=True)


def unpacked_shapes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a stand-in on the meta device for each packed one that has the shape it unpacks to.

    The stand-ins are bfloat16, which is what a packed model computes in unless told otherwise.
    """
    return {
        name: torch.empty(tensor.quant_shape, dtype=torch.bfloat16, device="meta") if is_packed(tensor) else tensor
        for name, tensor in tensors.items()
    }


def unpack(tensor: Tensor) -> Tensor:
    """A packed tensor's values; any other tensor as it is."""
    if not is_packed(tensor):
        return tensor
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(tensor)


def pack_linears(
    transformer: nn.Module, packed: dict[str, Tensor], dtype: torch.dtype, skip: Collection[str]
) -> list[str]:
    """Replace the Linear layers whose weights are packed by diffusers' `GGUFLinear`, which unpack them as they run.

    packed: by name of the parameter. skip: parts of names that stay plain. Returns the names of the weights that are
    then to be loaded packed; all others have to be unpacked first. Passes over packings outside `config.RECORDABLE_PACKINGS` wait for the
    device.
    """
    if not packed:
        return []
    from diffusers.quantizers.gguf.utils import GGUFLinear

    names = []
    for name, layer in list(transformer.named_modules()):
        weight = f"{name}.weight"
        if isinstance(layer, nn.Linear) and weight in packed and not set(skip).intersection(name.split(".")):
            with torch.device("meta"):
                linear = GGUFLinear(
                    layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype
                ).requires_grad_(False)
            linear.weight = packed[weight]
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, linear)
            names.append(weight)
    return names


def plain(tensor: Tensor) -> Tensor:
    """The bytes of a packed tensor as an ordinary tensor; any other tensor as it is."""
    return tensor.as_tensor() if is_packed(tensor) else tensor
