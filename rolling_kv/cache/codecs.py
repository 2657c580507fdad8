"""In which form a cache keeps its bytes: the model's dtype, or fewer bits.

Whatever the form, only one layer at a time is read back into the model's dtype, never the whole cache.
"""

from __future__ import annotations

import torch

Parts = tuple[torch.Tensor, ...]
"""The tensors that together hold some keys or values: the codes, and with int8 their scales. [..., S, H, ·] each."""


class ModelDtype:
    """Keeps what it is given. Reading gives views, not copies."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def widths(self, head_dim: int) -> list[tuple[int, torch.dtype]]:
        """Trailing size and dtype of each part."""
        return [(head_dim, self.dtype)]

    def bytes_per_head(self, head_dim: int) -> int:
        """Bytes that one key or one value of one head takes."""
        return sum(width * dtype.itemsize for width, dtype in self.widths(head_dim))

    def unpack_bytes(self, head_dim: int) -> int:
        """Bytes of the copy that `unpack` makes of one key or one value of one head."""
        return 0

    def pack(self, x: torch.Tensor) -> Parts:
        return (x,)

    def unpack(self, parts: Parts) -> torch.Tensor:
        return parts[0]


class Float8(ModelDtype):
    """float8_e4m3fn: half the bytes of bfloat16, 3 bits of mantissa. Keys are normalised, so no scale is needed."""

    limit = torch.finfo(torch.float8_e4m3fn).max

    def widths(self, head_dim):
        return [(head_dim, torch.float8_e4m3fn)]

    def unpack_bytes(self, head_dim):
        return head_dim * self.dtype.itemsize

    def pack(self, x):
        return (x.clamp(-self.limit, self.limit).to(torch.float8_e4m3fn),)

    def unpack(self, parts):
        return parts[0].to(self.dtype)


class Int8(ModelDtype):
    """int8 with a float32 scale per token and head: about half the bytes of bfloat16, and a fraction of float8's error."""

    def widths(self, head_dim):
        return [(head_dim, torch.int8), (1, torch.float32)]

    def unpack_bytes(self, head_dim):
        return head_dim * self.dtype.itemsize

    def pack(self, x):
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (x / scale).round().to(torch.int8), scale

    def unpack(self, parts):
        codes, scale = parts
        # The product is float32 and rounded as it is stored: a GPU makes no float32 copy.
        return torch.mul(codes, scale, out=torch.empty_like(codes, dtype=self.dtype))


CODECS = {"model": ModelDtype, "float8": Float8, "int8": Int8}
