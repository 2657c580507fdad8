"""Matrix products in float8 with a scale for each row: half the bytes of bfloat16, and twice its rate on GPUs that have them.

Each row of what goes in, a token, and each row of a weight is divided by its largest value, and rounded to three bits of mantissa.
Sums are kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..float8_linear import FLOAT8, Float8Linear
from .fused import is_plain

LARGEST = torch.finfo(FLOAT8).max
ALIGNED = 16
"""What both sizes of a weight have to be a multiple of."""


class Rows(NamedTuple):
    """Rows in float8. codes: [S, K]. scales: float32 [S, 1]."""

    codes: torch.Tensor
    scales: torch.Tensor


def quantised(x: torch.Tensor, gelu: bool = False) -> Rows:
    """The rows of [S, K], or their GELU, in float8."""
    wide = (F.gelu(x, approximate="tanh") if gelu else x).float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return Rows((wide / scales).to(FLOAT8), scales)


class Quantiser:
    """Quantises what products are given: once, where several are given the same tensor."""

    def __init__(self, kernels: Any = None):
        self.quantised: Callable[[torch.Tensor, bool], Rows] = quantised if kernels is None else kernels.quantised
        self._last: tuple[torch.Tensor, Rows] | None = None

    def __call__(self, x: torch.Tensor) -> Rows:
        """The rows of [..., K]."""
        if torch.compiler.is_compiling():  # which sees by itself what is made twice
            return self.quantised(x.flatten(0, -2), False)
        if self._last is None or self._last[0] is not x:
            self._last = x, self.quantised(x.flatten(0, -2), False)
        return self._last[1]


class Product:
    """What stands in the place of a Linear layer's forward: its product in float8."""

    def __init__(self, linear: torch.nn.Linear, quantiser: Quantiser):
        self.quantiser = quantiser
        with torch.no_grad():
            weight = stored(linear)
            # The product takes its second matrix column by column, which a weight's rows are.
            self.weight, self.scales = weight.codes.t(), weight.scales.t().contiguous()
        self.bias = linear.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K]. Returns [..., N]."""
        return self.of(self.quantiser(x), x)

    def of(self, rows: Rows, like: torch.Tensor) -> torch.Tensor:
        """The same of rows that are in float8 already. like: a tensor of the result's dtype and leading sizes."""
        bias = None if self.bias is None else self.bias.to(like.dtype)
        made = torch._scaled_mm(
            rows.codes, self.weight, rows.scales, self.scales, bias=bias, out_dtype=like.dtype, use_fast_accum=True
        )
        return made.unflatten(0, like.shape[:-1])


def stored(linear: torch.nn.Linear) -> Rows:
    """The rows of a layer's weight [N, K]: as they are kept, where that is in float8."""
    if not isinstance(linear, Float8Linear):
        return quantised(linear.weight)
    scale = torch.ones((), device=linear.weight.device) if linear.scale is None else linear.scale
    return Rows(linear.weight, scale.expand(linear.out_features, 1))


def float8_forwards(blocks: Iterable, kernels: Any = None) -> list[tuple[torch.nn.Module, Callable]]:
    """Each Linear layer of the blocks that multiplies in float8, and its forward; the feed-forward parts around them.

    kernels: the module `kernels`, where passes use it.
    """
    quantiser, pairs = Quantiser(kernels), []
    for block in blocks:
        products = {id(linear): Product(linear, quantiser) for linear in layers_of(block)}
        for linear in layers_of(block):
            pairs.append((linear, products[id(linear)]))
        gelu = block.ffn.net[0]
        up, down = (products.get(id(linear)) for linear in (getattr(gelu, "proj", None), block.ffn.net[-1]))
        known = len(block.ffn.net) == 3 and getattr(gelu, "approximate", None) == "tanh" and is_plain(block.ffn)
        if known and is_plain(gelu) and up is not None and down is not None:
            pairs.append((block.ffn, _feed_forward(up, down)))
    return pairs


def _feed_forward(up: Product, down: Product) -> Callable:
    """A forward for a block's `ffn`, whose GELU is computed as its result is quantised."""

    def forward(x: torch.Tensor, *_, **__) -> torch.Tensor:
        """x: [B, S, dim]. Returns [B, S, dim]."""
        hidden = up(x)
        return down.of(down.quantiser.quantised(hidden.flatten(0, -2), True), x)

    return forward


def layers_of(block) -> list[torch.nn.Linear]:
    """The Linear layers of a block that multiply a chunk's tokens, of those that nothing of somebody else's stands in.

    A prompt's keys and values are computed once, and stay as they are.
    """
    attentions = [getattr(block.attn1, name) for name in ("to_q", "to_k", "to_v")] + [block.attn2.to_q]
    outputs = [block.attn1.to_out[0], block.attn2.to_out[0]]
    feeding = [getattr(block.ffn.net[0], "proj", None), block.ffn.net[-1]]
    return [linear for linear in [*attentions, *outputs, *feeding] if _may_be_float8(linear)]


def _may_be_float8(linear) -> bool:
    known = type(linear) in (torch.nn.Linear, Float8Linear) and is_plain(linear)
    return known and linear.in_features % ALIGNED == 0 == linear.out_features % ALIGNED


def bytes_of(transformer, *, offloaded: bool = False) -> int:
    """Bytes that an attachment whose products are in float8 takes beside the weights.

    offloaded: whether those lie in CPU memory, where they stay as they are.
    """
    if offloaded:
        return 0
    layers = [linear for block in transformer.blocks for linear in layers_of(block)]
    return sum(
        linear.out_features * ((0 if isinstance(linear, Float8Linear) else linear.in_features) + 4) for linear in layers
    )


def check(device: torch.device | str) -> None:
    """Multiply a few numbers on a device, and compare. Raises RuntimeError where they are others, or it cannot."""
    random = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
        x = torch.randn(32, 64, generator=random).bfloat16()
        plain = linear.float()(x.float())
        made = Product(linear.bfloat16().to(device), Quantiser())(x.to(device))
    error = float((made.cpu().float() - plain).norm() / plain.norm())
    if not error <= 0.06:
        raise RuntimeError(f"its float8 products are off by {error:.2g} of their size")
