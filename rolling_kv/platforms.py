"""What torch does well on which hardware and in which versions: kernels of attention, half precision, convolutions.

Each answer is a function of a `Platform` alone.
"""

from __future__ import annotations

import platform as system
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AMPERE = (8, 0)
"""The first NVIDIA GPUs that compute in bfloat16, and for which there are fused kernels of attention in it."""
ADA = (8, 9)
"""The first NVIDIA GPUs that multiply in float8."""
HOPPER = 9
"""The major compute capability of the GPUs for which FlashAttention 3 is made; older ones have an earlier one's kernels in it."""
CUDNN_ATTENDS = 91501
"""cuDNN before 9.15.1 has a fault in attention to keys whose number is no multiple of 128."""

NO_BFLOAT16 = ("gfx8", "gfx900", "gfx902", "gfx906", "gfx909", "gfx90c", "gfx10")
"""How the names of AMD's architectures begin that do not compute in bfloat16: up to Vega, and RDNA 1 and 2."""
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether this CPU has vectors of AVX2 and no longer ones: without AVX-512, oneDNN has no products in half precision."""
_CONVOLVING = RLock()


class Platform(NamedTuple):
    """A device, and what drives it.

    kind: "cuda" for NVIDIA, "rocm" for AMD, else the type of the torch device.
    capability: compute capability on CUDA, version of macOS on MPS, nothing elsewhere.
    arch: name of the architecture on ROCm (gfx1100), nothing elsewhere.
    torch: version, (2, 9, 1).
    cudnn: version as cuDNN counts it, 91501 for 9.15.1; 0 without.
    """

    kind: str
    capability: tuple[int, ...] = ()
    arch: str = ""
    torch: tuple[int, ...] = ()
    cudnn: int = 0


def platform_of(device: torch.device | str) -> Platform:
    """The platform of a device; where nobody can be asked, as on a machine without a GPU, a CUDA device counts as Ampere."""
    device = torch.device(device)
    version = _numbers(torch.__version__)[:3]
    if device.type == "mps":
        return Platform("mps", _numbers(system.mac_ver()[0]), torch=version)
    if device.type != "cuda":
        return Platform(device.type, torch=version)
    is_here = torch.cuda.is_available()
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName if is_here else ""
        return Platform("rocm", arch=arch, torch=version)
    capability = torch.cuda.get_device_capability(device) if is_here else AMPERE
    return Platform("cuda", capability, torch=version, cudnn=torch.backends.cudnn.version() or 0)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def attention_kernels(platform: Platform, dtype: torch.dtype) -> tuple[SDPBackend, ...]:
    """The kernels that SDPA should try for tensors of a dtype, the best first; none where its own choice is as good.

    cuDNN's is the fastest from Ampere on, and what PyTorch itself chooses depends on version and system.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    if platform.kind != "cuda" or not is_half or platform.capability < AMPERE or platform.torch < (2, 7):
        return ()
    others = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    return (SDPBackend.CUDNN_ATTENTION, *others) if platform.cudnn >= CUDNN_ATTENDS else others


def attending_with(kernels: Iterable[SDPBackend]) -> AbstractContextManager:
    """Lets SDPA try these kernels in their order for a while; none: leaves it as it is."""
    kernels = list(kernels)
    return sdpa_kernel(kernels, set_priority=True) if kernels else nullcontext()


def has_bfloat16(platform: Platform) -> bool:
    """Whether the hardware computes in bfloat16: else torch imitates it slowly, without fused kernels of attention."""
    if platform.kind == "cuda":
        return platform.capability >= AMPERE
    if platform.kind == "rocm":
        return not platform.arch.startswith(NO_BFLOAT16)
    return platform.kind != "mps" or platform.capability >= (14,)


def has_float8_products(platform: Platform) -> bool:
    """Whether the hardware multiplies float8_e4m3fn, of which torch makes use with a scale for each row."""
    return platform.kind == "cuda" and platform.capability >= ADA


def runs_flash_3(platform: Platform) -> bool:
    """Whether FlashAttention 3 may be tried: where it has no kernel for the hardware, it ends the process."""
    return platform.kind == "cuda" and platform.capability[0] == HOPPER


def too_new_for_flash_3(platform: Platform) -> bool:
    """Whether FlashAttention 3 would end the process for certain."""
    return platform.kind == "cuda" and platform.capability[0] > HOPPER


def rounds_to_tf32(platform: Platform, dtype: torch.dtype) -> bool:
    """Whether convolutions in a dtype round their operands to TF32, ten bits of mantissa, unless that is turned off."""
    return platform.kind == "cuda" and platform.capability >= AMPERE and dtype == torch.float32


def exact_convolutions(weight: Tensor) -> AbstractContextManager:
    """Lets convolutions with such weights compute in the weights' own precision for a while."""
    return _without_tf32() if rounds_to_tf32(platform_of(weight.device), weight.dtype) else nullcontext()


@contextmanager
def _without_tf32() -> Iterator[None]:
    """The setting is the process's, and several threads convolve: each waits until the others have put it back."""
    convolutions: Any = getattr(torch.backends.cudnn, "conv", None)  # from PyTorch 2.9 on
    owner, name, exact = (
        (torch.backends.cudnn, "allow_tf32", False)
        if convolutions is None
        else (convolutions, "fp32_precision", "ieee")
    )
    with _CONVOLVING:
        before = getattr(owner, name)
        setattr(owner, name, exact)
        try:
            yield
        finally:
            setattr(owner, name, before)
