"""A Linear layer whose weight lies in float8, one byte a value, and is brought to the dtype of its input for each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn


class Float8Linear(nn.Linear):
    """A Linear with its weight and bias in float8_e4m3fn. What it computes in is the dtype of what it is given.

    A call reads a byte and writes the input's two for each value, and what it wrote is gone when it returns. The stored
    weight stays where it is.

    scale: float32 [1, 1] or [out, 1], by which the weight is multiplied; None where it was stored without one.
    """

    scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, scale: Tensor | None = None, device=None
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=FLOAT8)
        self.requires_grad_(False)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, linear: nn.Linear, scale: Tensor | None = None) -> Float8Linear:
        """The same layer in float8: what it computes agrees to the rounding of its weight and bias.

        scale: of the weight, for one that is float8 already; it may be on the meta device, as the layer may.
        """
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None, scale=scale)
        made.weight = nn.Parameter(linear.weight.to(FLOAT8), requires_grad=False)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.to(FLOAT8), requires_grad=False)
        return made.train(linear.training)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype, [out, in], rounded once."""
        wide = self.weight.to(dtype)
        return wide if self.scale is None else wide.mul_(self.scale)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.widened(input.dtype), bias)
