"""Kernels of other packages in the place of PyTorch's own operations, where they are installed and at least as fast.

They are for devices on which `kernels` are not made, as on Windows without Triton: those do more in one pass over memory than
any of these. docs/speed.md has what was looked at, and what does not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch

from ..rope import rotate

logger = logging.getLogger(__name__)

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Turns heads [B, S, H, D] in half precision by the `matrices` of their rotation."""
Clock = Callable[[Callable[[], object], torch.device], float]
"""Milliseconds that a device takes for some work."""
TOKENS = 4680
"""Those of three frames at 480x832. One size decides: where two ways are about as fast, each run might choose another rounding."""
WARMUP, TIMES = 3, 10


def _comfy_kitchen(heads: torch.Tensor, turning: torch.Tensor) -> Rotate:
    """Its function for such tensors: in CUDA from PyTorch for CUDA 13 on, as ComfyUI has it, else in something slower."""
    registry = import_module("comfy_kitchen").registry
    return registry.get_implementation("apply_rope1", kwargs={"x": heads, "freqs_cis": turning})


ROTATIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Rotate]] = {"comfy_kitchen": _comfy_kitchen}
"""What finds a function that rotates neighbouring dims in float32, by the package that it is in."""


def matrices(rotation: torch.Tensor) -> torch.Tensor:
    """The matrix of each complex number, float32 [B or 1, S, 1, D / 2, 2, 2] of complex64 [B or 1, S, 1, D / 2]."""
    cosine, sine = rotation.real, rotation.imag
    return torch.stack((cosine, -sine, sine, cosine), -1).unflatten(-1, (2, 2))


@lru_cache
def rotation_on(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Rotate | None:
    """What rotates heads in a dtype the fastest on a device; None: `rope.rotate`. It is tried and timed once."""
    if device.type != "cuda":
        return None
    installed = {package: found for package, found in ROTATIONS.items() if find_spec(package) is not None}
    return quickest(installed, device, dtype, (1, TOKENS, heads, head_dim)) if installed else None


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """What a CUDA device takes for some work, where that is asked for several times in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        for _ in range(WARMUP):
            work()
        begin.record()
        for _ in range(TIMES):
            work()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / TIMES


def quickest(
    candidates: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Rotate]],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    clock: Clock = milliseconds,
) -> Rotate | None:
    """The fastest of the functions of some packages that give what `rope.rotate` gives; None where that is faster.

    Says in a line of the log what was taken, and why the others were not.
    """
    random = torch.Generator(device).manual_seed(0)
    heads = torch.randn(shape, generator=random, device=device).to(dtype)
    angles = torch.rand(1, shape[1], 1, shape[3] // 2, generator=random, device=device)
    rotation = torch.polar(torch.ones_like(angles), angles)
    turning, plain = matrices(rotation), rotate(heads, rotation)
    best, least = None, clock(partial(rotate, heads, rotation), device)
    said = [f"PyTorch {least:.3f} ms"]
    for package, found in candidates.items():
        try:
            turn = found(heads, turning)
            if not _rounded_alike(turn(heads, turning), plain):
                said.append(f"{package} gives other numbers")
                continue
            taken = clock(partial(turn, heads, turning), device)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            said.append(f"{package} cannot ({reason[0]})")
            continue
        said.append(f"{package} {taken:.3f} ms")
        if taken <= least:
            best, least = turn, taken
    logger.info(f"Rotation of {'x'.join(map(str, shape))}: {', '.join(said)}")
    return best


def _rounded_alike(made: torch.Tensor, plain: torch.Tensor) -> bool:
    if made.dtype != plain.dtype or made.shape != plain.shape:
        return False
    allowed = torch.finfo(plain.dtype).eps * (plain.float().abs() + 2**-6)
    return bool(((made.float() - plain.float()).abs() <= allowed).all())
