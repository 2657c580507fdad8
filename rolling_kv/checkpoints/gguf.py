"""Weights packed in GGUF files, unpacked by diffusers' quantiser while a layer runs; the tokenizer of text encoders."""

from __future__ import annotations

import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from diffusers.utils import is_gguf_available
from torch import Tensor, nn

from ..messages import shortened

GGUF_PACKAGE = "gguf>=0.13"
TOKENIZER_TENSOR = "spiece_model"
"""The bytes of a SentencePiece model, among the tensors of a text encoder: ComfyUI's files have it, GGUF files get it."""
_MOST_ENTRIES = 8_000_000
"""Reads of the package for one header; UMT5's vocabulary takes under two million."""


def is_packed(tensor: Tensor) -> TypeGuard[Any]:  # diffusers does not declare the attributes of its class
    """Whether the tensor is a `GGUFParameter`: bytes, which unpack to the shape `quant_shape`."""
    return hasattr(tensor, "quant_type")


def as_packed(data: Tensor, packing: int) -> Tensor:
    """Bytes as a `GGUFParameter`; packing: a `GGMLQuantizationType`."""
    from diffusers.quantizers.gguf.utils import GGUFParameter

    return GGUFParameter(data, quant_type=packing)  # pyright: ignore[reportCallIssue]: torch declares a parameter's __init__


def read_gguf(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file under its own names, mapped from disk; packed ones as diffusers' `GGUFParameter`.

    A tensor that was folded has the shape that the file's `comfy.gguf.orig_shape` tells. A T5's tokenizer is among the
    tensors, as TOKENIZER_TENSOR.

    Raises ImportError without the package gguf, NotImplementedError for a packing that diffusers does not unpack, and
    whatever the package raises for a file that is none or is damaged.
    """
    if not is_gguf_available():
        raise ImportError(f'reading GGUF files needs the Python package gguf. Install it: pip install "{GGUF_PACKAGE}"')
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
    from gguf import GGMLQuantizationType

    reader = _reader(path)
    tensors = {}
    for entry in reader.tensors:
        kind = entry.tensor_type
        data = torch.from_numpy(entry.data)
        if kind == GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        elif kind in SUPPORTED_GGUF_QUANT_TYPES:
            data = as_packed(data, kind)
        elif kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            raise NotImplementedError(
                f"{shortened(entry.name)} is packed as {kind.name}, which diffusers does not unpack."
            )
        shape = reader.fields.get(f"comfy.gguf.orig_shape.{entry.name}")
        if shape is not None:  # GGUF has at most four dimensions, and rows of whole blocks: converters fold the others
            data = unpack(data).reshape([int(shape.parts[index][0]) for index in shape.data])
        tensors[entry.name] = data
    if "tokenizer.ggml.tokens" in reader.fields:
        tensors[TOKENIZER_TENSOR] = torch.frombuffer(bytearray(_sentencepiece_model(reader.fields)), dtype=torch.uint8)
    return tensors


def _reader(path: Path):
    """The package's reader, mapped copy on write, which ends at the end of the file and after so many entries.

    The package takes what lies beyond the end for empty, so a file that claims a long list keeps it busy for ever.
    """
    from gguf import GGUFReader

    class Reader(GGUFReader):
        reads = 0

        def _get(self, offset, dtype, count=1, *args, **kwargs):
            self.reads += 1
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if not 0 <= offset <= end <= len(self.data):
                raise ValueError("an entry lies outside the file")
            if self.reads > _MOST_ENTRIES:
                raise ValueError(f"more than {_MOST_ENTRIES:,} entries")
            return super()._get(offset, dtype, count, *args, **kwargs)

    return Reader(path, mode="c")


def _sentencepiece_model(fields: dict) -> bytes:
    """The tokenizer in the metadata of a GGUF file, as the SentencePiece model that it was made from.

    A SentencePiece model is a message of protobuf; field numbers are those of sentencepiece_model.proto, and GGUF's types
    of tokens are the same numbers.
    """

    def value(name: str, default):
        field = fields.get(f"tokenizer.ggml.{name}")
        return default if field is None else field.parts[field.data[-1]][0].item()

    def values(name: str):
        field = fields[f"tokenizer.ggml.{name}"]
        return [field.parts[index] for index in field.data]

    if bytes(fields["tokenizer.ggml.model"].parts[-1]) != b"t5":
        raise ValueError("its tokenizer is not that of a T5 or UMT5")
    model = b"".join(
        _proto(1, _proto(1, bytes(text)) + _proto(2, float(score[0])) + _proto(3, int(kind[0])))
        for text, score, kind in zip(values("tokens"), values("scores"), values("token_type"), strict=True)
    )
    trainer = {
        3: 1,
        40: value("unknown_token_id", 2),
        41: -1,
        42: value("eos_token_id", 1),
        43: value("padding_token_id", 0),
    }
    normalizer: dict[int, bytes | int] = {
        3: int(value("add_space_prefix", True)),
        4: int(value("remove_extra_whitespaces", True)),
    }
    if "tokenizer.ggml.precompiled_charsmap" in fields:
        normalizer[2] = b"".join(bytes(part) for part in values("precompiled_charsmap"))
    model += _proto(2, b"".join(_proto(number, setting) for number, setting in trainer.items()))
    return model + _proto(3, b"".join(_proto(number, setting) for number, setting in normalizer.items()))


def _proto(number: int, value: bytes | float | int) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value & 2**64 - 1)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def gguf_types(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the packings (Q8_0, Q4_K, …), the one with the most values first; empty when nothing is packed."""
    sizes: dict[str, int] = {}
    for tensor in filter(is_packed, tensors.values()):
        sizes[tensor.quant_type.name] = sizes.get(tensor.quant_type.name, 0) + tensor.numel()
    return sorted(sizes, key=sizes.__getitem__, reverse=True)


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
