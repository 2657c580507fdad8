"""What torch does well on which hardware and in which versions: kernels of attention, half precision, convolutions.

Each answer is a function of a `Platform` alone.
"""

from __future__ import annotations

import platform as system
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

AMPERE = (8, 0)
"""The first NVIDIA GPUs that compute in bfloat16, and for which there are fused kernels of attention in it."""
CUDNN_ATTENDS = 91501
"""cuDNN before 9.15.1 has a fault in attention to keys whose number is no multiple of 128."""


class Platform(NamedTuple):
    """A device, and what drives it.

    kind: "cuda" for NVIDIA, "rocm" for AMD, else the type of the torch device.
    capability: compute capability on CUDA, version of macOS on MPS, nothing elsewhere.
    arch: name of the architecture on ROCm (gfx1100), nothing elsewhere.
    torch: major and minor version.
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
    version = _numbers(torch.__version__)[:2]
    if device.type == "mps":
        return Platform("mps", _numbers(system.mac_ver()[0]), torch=version)
    if device.type != "cuda":
        return Platform(device.type, torch=version)
    if torch.version.hip:
        return Platform("rocm", arch=torch.cuda.get_device_properties(device).gcnArchName, torch=version)
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else AMPERE
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
