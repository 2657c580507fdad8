"""Attention over a window by each of PyTorch's backends, and the matrix products of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..chunks.experiment import Workload
from ..gauges import turns
from ..random_model import HEAD_DIM

DEFAULT = "default"
BACKENDS = (DEFAULT, "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
"""PyTorch's own choice, and the kernels among which it chooses."""
WARMUP = 3


class Attention(NamedTuple):
    """Of one backend and number of latent frames in the window.

    milliseconds: on views of the cache, as the engine has them. packed: with query, keys and values copied first.
    tflops: of the views. difference: largest, from PyTorch's own choice. error: why there is nothing to tell, or empty.
    """

    backend: str
    frames: int
    milliseconds: float | None = None
    packed: float | None = None
    tflops: float | None = None
    difference: float | None = None
    error: str = ""


class Product(NamedTuple):
    """Of one shape (rows, outputs, inputs), in milliseconds: a Linear, one with GELU behind it, both as one kernel, float8.

    tflops: of the plain Linear. None: not to be had here.
    """

    shape: tuple[int, int, int]
    linear: float
    linear_gelu: float
    fused_gelu: float | None
    float8: float | None
    tflops: float


def measure_attention(load: Workload, repeats: int, say: Callable[[str], None]) -> list[Attention]:
    """Every backend with a chunk, half a window and a whole one."""
    window, frame, chunk = load.cache.limit or 0, load.tokens_per_frame, load.sampling.chunk
    cached, query = (
        torch.randn(shape, dtype=load.dtype, device=load.device)
        for shape in (
            (2, 1, window * frame, load.size.heads, HEAD_DIM),
            (1, chunk * frame, load.size.heads, HEAD_DIM),
        )
    )
    rows = []
    for frames in sorted({chunk, max(window // 2, 1), window}):
        views = [heads.transpose(1, 2) for heads in (query, *cached[:, :, : frames * frame])]
        expected = _attend(*views)
        for backend in BACKENDS:
            rows.append(_attention(backend, frames, views, expected, load.device, repeats))
            say(f"attention, {frames} frames, {backend}")
    return rows


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def _attention(
    backend: str, frames: int, views: Sequence[Tensor], expected: Tensor, device: torch.device, repeats: int
) -> Attention:
    def attend(tensors: Sequence[Tensor] = views) -> Tensor:
        if backend == DEFAULT:
            return _attend(*tensors)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _attend(*tensors)

    try:
        seconds = _seconds(attend, device, repeats)
        packed = _seconds(lambda: attend([view.contiguous() for view in views]), device, repeats)
        difference = float((attend() - expected).abs().max())
    except RuntimeError as error:
        return Attention(backend, frames, error=str(error).strip().splitlines()[0][:60])
    _, heads, tokens, width = views[0].shape
    operations = 4 * tokens * views[1].shape[2] * heads * width
    return Attention(backend, frames, seconds * 1e3, packed * 1e3, operations / seconds / 1e12, difference)


def measure_products(load: Workload, repeats: int, say: Callable[[str], None]) -> list[Product]:
    """The Linear layers of a block, query, key and value as one among them."""
    tokens, dim, ffn = load.sampling.chunk * load.tokens_per_frame, load.size.dim, load.size.ffn
    rows = []
    for outputs, inputs in ((dim, dim), (3 * dim, dim), (ffn, dim), (dim, ffn)):
        rows.append(_product(tokens, outputs, inputs, load, repeats))
        say(f"matrix products, {tokens} x {outputs} x {inputs}")
    return rows


def _product(rows: int, outputs: int, inputs: int, load: Workload, repeats: int) -> Product:
    x, weight, bias = (
        torch.randn(shape, dtype=load.dtype, device=load.device)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )

    def seconds(work: Callable[[], object]) -> float:
        return _seconds(work, load.device, repeats)

    fused: Any = getattr(torch, "_addmm_activation", None)
    plain = seconds(lambda: F.linear(x, weight, bias))
    return Product(
        (rows, outputs, inputs),
        plain * 1e3,
        seconds(lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh")) * 1e3,
        None if fused is None else seconds(lambda: fused(bias, x, weight.t(), use_gelu=True)) * 1e3,
        _float8(x, weight, bias, load, repeats),
        2 * rows * outputs * inputs / plain / 1e12,
    )


def _float8(x: Tensor, weight: Tensor, bias: Tensor, load: Workload, repeats: int) -> float | None:
    """Milliseconds of the same product of float8 values; None on a device that has none."""
    multiply: Any = getattr(torch, "_scaled_mm", None)
    if load.device.type != "cuda" or multiply is None or torch.cuda.get_device_capability(load.device) < (8, 9):
        return None
    values, weights = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    one = torch.ones((), device=load.device)

    def product() -> Tensor:
        return multiply(values, weights.t(), scale_a=one, scale_b=one, bias=bias, out_dtype=load.dtype)

    try:
        return _seconds(product, load.device, repeats) * 1e3
    except (RuntimeError, ValueError):  # a shape or dtype that the library does not take
        return None


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    turns(work, device, WARMUP)
    return median(turns(work, device, repeats))
