"""A Triton kernel for half precision on a GPU: a norm and the activation behind it in one pass over a picture.

Imported only where it is used, see `wan.streamline`, which has the plain path that gives the same to rounding. A program has
some places of a picture, with all channels of each; what it computes is float32, and rounded as it is stored.
"""

# Triton does not annotate that a kernel is indexed by its grid, and then takes numbers and options of its own.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn.functional import rms_norm, silu

VALUES = 4096
"""That one program takes, or those of one place where these are more."""
CLOSE = 2**-8
"""How far the numbers of `check`, of size 1, may lie from those of the plain path."""


def activated_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """SiLU of the RMSNorm over the channels of [B, C, …], with the channels last in memory, as they are in what it gives.

    weight: C values. eps: added to the mean square.
    """
    last = x.movedim(1, -1).contiguous()
    out, channels = torch.empty_like(last), x.shape[1]
    block = triton.next_power_of_2(channels)
    places, at_once = last.numel() // channels, max(VALUES // block, 1)
    if places:
        _activated_norm[(triton.cdiv(places, at_once),)](
            last, weight.flatten(), out, places, eps, CHANNELS=channels, BLOCK=block, AT_ONCE=at_once
        )
    return out.movedim(-1, 1)


@triton.jit
def _activated_norm(
    x, weight, out, places, eps, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (place < places) & (channel < CHANNELS)
    at = place * CHANNELS + channel
    row = tl.load(x + at, inside, 0.0).to(tl.float32)
    row *= tl.rsqrt(tl.sum(row * row, 1) / CHANNELS + eps)[:, None]
    row *= tl.load(weight + channel, channel < CHANNELS, 0.0).to(tl.float32)
    tl.store(out + at, (row * tl.sigmoid(row)).to(out.dtype.element_ty), inside)


def check(device: torch.device) -> None:
    """Make a few numbers on a device, and compare them with those of the plain path.

    Raises RuntimeError where they are others, and whatever Triton raises where it cannot make code for the device.
    """
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=random).to(device, torch.float16) for shape in ((1, 24, 1, 3, 5), (24,)))
    plain = silu(rms_norm(x.float().movedim(1, -1), (24,), weight.float())).movedim(-1, 1)
    error = float((activated_norm(x, weight, 0.0).float() - plain).abs().amax() / plain.abs().amax().clamp(min=1))
    if not error <= CLOSE:
        raise RuntimeError(f"its activated norms are off by {error:.2g} of the largest")
