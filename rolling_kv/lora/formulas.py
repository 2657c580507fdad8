"""What an adapter adds to a parameter: a formula for each kind that a low-rank layer of peft does not cover.

The names of the tensors and the formulas are those of the trainers: LyCORIS, kohya's scripts, PEFT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Change(NamedTuple):
    """The change of one parameter as a whole.

    kind: a key of FORMULAS.
    tensors: by the names that the formula knows them by; `magnitude` makes it a DoRA of that kind.
    scale: alpha / rank; 1 where the kind has none.
    """

    kind: str
    tensors: dict[str, Tensor]
    scale: float = 1.0


def difference(change: Change, weight: Tensor) -> Tensor:
    """What the change adds at strength 1 to `weight`, the parameter without any LoRA in float32; of its shape."""
    tensors = {name: tensor.to(weight.device, torch.float32) for name, tensor in change.tensors.items()}
    added = FORMULAS[change.kind](tensors, weight).reshape(weight.shape) * change.scale
    if "magnitude" in tensors:
        return _with_magnitude(weight + added, tensors["magnitude"]) - weight
    return added


def shape_of(change: Change, weight_shape: tuple[int, ...] = (1, 1)) -> tuple[int, ...]:
    """Shape of a parameter that the change fits, computed without values.

    Raises KeyError for a tensor that is missing, RuntimeError, IndexError or ValueError where they do not go together.
    """
    if change.kind == "oft":  # it turns the outputs of a weight, whatever its inputs
        number, size, other = change.tensors["oft_blocks"].shape
        if size != other:
            raise ValueError("blocks that are not square")
        if "rescale" in change.tensors and change.tensors["rescale"].numel() != number * size:
            raise ValueError("lengths for another number of outputs")
        return number * size, *weight_shape[1:]
    shape = tuple(
        FORMULAS[change.kind]({name: tensor.to("meta") for name, tensor in change.tensors.items()}, None).shape
    )
    if change.kind != "diff" and len(shape) < 2:
        raise ValueError("not matrices")
    if "magnitude" in change.tensors and change.tensors["magnitude"].numel() not in shape[:2]:
        raise ValueError("magnitudes for another number of outputs")
    return shape


def _low_rank(tensors: dict[str, Tensor], _) -> Tensor:
    down, up = tensors["down"], tensors["up"]
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _kronecker(tensors: dict[str, Tensor], _) -> Tensor:
    small, large = _factor(tensors, "lokr_w1"), _factor(tensors, "lokr_w2", "lokr_t2")
    return torch.kron(small.reshape(*small.shape, *[1] * (large.ndim - small.ndim)), large.contiguous())


def _hadamard(tensors: dict[str, Tensor], _) -> Tensor:
    return _factor(tensors, "hada_w1", "hada_t1") * _factor(tensors, "hada_w2", "hada_t2")


def _factor(tensors: dict[str, Tensor], name: str, core: str = "") -> Tensor:
    """A factor that is given as it is, as a product of two matrices, or in Tucker's form with a core."""
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return torch.einsum("ij...,ip,jr->pr...", tensors[core], a, b) if core in tensors else a @ b


def _rotation(tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Blocks of outputs, each turned by an orthogonal matrix, the Cayley transform of a skew-symmetric one."""
    blocks = tensors["oft_blocks"]
    skew = blocks - blocks.mT
    limit = tensors["alpha"].item() * len(weight) if "alpha" in tensors else 0  # as LyCORIS and kohya define it
    if 0 < limit < skew.norm():
        skew = skew * (limit / skew.norm())
    one = torch.eye(blocks.shape[1], device=blocks.device)
    rotation = (one + skew) @ torch.linalg.inv(one - skew)
    turned = torch.einsum("knm,kni->kmi", rotation, weight.reshape(*blocks.shape[:2], -1)).reshape(len(weight), -1)
    if "rescale" in tensors:
        turned = turned * tensors["rescale"].reshape(-1, 1)
    return turned.reshape(weight.shape) - weight


def _with_magnitude(merged: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: the merged weight, with each output (or each input, as LyCORIS had it first) given its length."""
    outputs, inputs = merged.shape[:2]
    of_outputs = magnitude.numel() == outputs and (
        magnitude.ndim == 1 or len(magnitude) == outputs or inputs != outputs
    )
    axis = 0 if of_outputs else 1
    others = [dim for dim in range(merged.ndim) if dim != axis]
    norm = merged.norm(dim=others, keepdim=True).clamp_min(torch.finfo(merged.dtype).tiny)
    return merged * (magnitude.reshape(norm.shape) / norm)


FORMULAS = {
    "diff": lambda tensors, _: tensors["diff"],
    "lora": _low_rank,
    "lokr": _kronecker,
    "loha": _hadamard,
    "oft": _rotation,
}
