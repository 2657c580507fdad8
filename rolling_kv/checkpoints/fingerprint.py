"""What tells weights apart: a digest that every value enters, and a check that every value is a number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from ..messages import shortened
from .gguf import is_packed, plain
from .readers import CheckpointError

_BLOCK = 2**15
"""Words of 8 bytes that make one sum: 256 KiB, which stay in a processor's cache."""


def fingerprint(tensors: dict[str, Tensor], about: object = None) -> str:
    """16 hex digits over names, shapes, dtypes and every value of the tensors, on whatever device they are.

    about: JSON values that belong to it.

    The values enter as whole numbers, in sums that wrap around: no order of adding and no device changes them. Each
    word is multiplied by an odd number of its place first, so that a changed word always changes its sum, and words
    that change places do. 0.3 seconds a GiB on one CPU core.
    """
    tensors = {name: plain(tensor).detach() for name, tensor in sorted(tensors.items())}
    shape = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([about, shape]).encode())
    places = torch.frombuffer(bytearray(hashlib.shake_256(b"places").digest(8 * _BLOCK)), dtype=torch.int64) | 1
    with torch.inference_mode():
        sums = [part for tensor in tensors.values() for part in _sums(tensor, places)]
        digest.update(torch.cat(sums).numpy().tobytes() if sums else b"")
    return digest.hexdigest()[:16]


def _sums(tensor: Tensor, places: Tensor) -> Iterator[Tensor]:
    on_gpu = tensor.device.type == "cuda"
    values = (tensor if on_gpu else tensor.cpu()).contiguous().reshape(-1).view(torch.uint8)
    if missing := -len(values) % 8:
        values = torch.nn.functional.pad(values, (0, missing))
    if values.storage_offset() % 8:
        values = values.clone()
    words, places = values.view(torch.int64), places.to(values.device)
    whole = len(words) // _BLOCK * _BLOCK
    for blocks in words[:whole].view(-1, _BLOCK).split(256 if on_gpu else 4):
        yield (blocks * places).sum(1).cpu()
    rest = words[whole:]
    yield (rest * places[: len(rest)]).sum(0, keepdim=True).cpu()


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError for tensors with NaN or infinity in them; packed ones are not looked into.

    0.2 seconds a GiB on one CPU core.
    """
    names = [name for name, tensor in tensors.items() if not is_packed(tensor)]
    finite = [_finite(tensors[name]) for name in names]
    if finite and not (together := torch.stack(finite)).all():
        bad = [name for name, good in zip(names, together.tolist()) if not good]
        raise CheckpointError(
            f"{len(bad)} of {len(finite)} tensors hold values that are no numbers (NaN or infinity), the first of them "
            f"{shortened(bad[0])}. Download the file again; if it was loaded as float16, choose bfloat16."
        )


def _finite(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu" and tensor.dtype.itemsize > 1:  # twenty times faster there than isfinite
        return torch.stack(torch.aminmax(tensor.detach())).isfinite().all()
    return tensor.isfinite().all()
