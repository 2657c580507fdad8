"""Triton kernels for half precision on a GPU: what a block does between its matrix products, each in one pass over memory.

Imported only where passes use it, see `execution.kernels_for`. Beside each kernel is a plain path that gives the same to
rounding: `fused` for the norms, `processors.normalise` and `rope.rotate` for queries and keys, the cache's codecs for what
is kept. A program has one token; what it computes is float32, and rounded as it is stored.
"""

# Triton does not annotate that a kernel is indexed by its grid, and then takes numbers and options of its own.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..cache.codecs import CODECS, Parts
from ..cache.rolling import Places, put_at
from ..rope import rotary_rotations, rotate
from . import products
from .products import Rows

MODEL, FLOAT8, INT8 = 0, 1, 2
"""In which form a part keeps its values: see `cache.codecs`."""
FORMS = {torch.float8_e4m3fn: FLOAT8, torch.int8: INT8}
CLOSE = {"model": 2**-8, "float8": 2**-3, "int8": 2**-5}
"""How far the numbers of `check`, of size 1, may lie from those of the plain path when they are kept in each form."""
WIDENED = 2048
"""Values that one program of `_widen` unpacks."""


def normed(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm of [B, S, dim], then x * scale + shift.

    scale, shift: float32 [B or 1, R, dim], R rows of which each is for as many tokens as the others; or [1, dim].
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, None, None, scale, shift, eps, out, out)
    return out


def summed_and_normed(
    x: torch.Tensor,
    added: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added * gate for [B, S, dim], and of that what `normed` gives. gate: as scale and shift; None: 1."""
    total, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch_norm(x, added, gate, scale, shift, eps, total, out)
    return total, out


def _launch_norm(x, added, gate, scale, shift, eps, total, out) -> None:
    batch, tokens, dim = x.shape
    rows = [None if given is None else given.view(len(given), -1, dim) for given in (gate, scale, shift)]
    spread = [0 if row is None else row.stride(0) * (len(row) > 1) for row in rows]
    steps = [0 if row is None else row.stride(1) * (row.shape[1] > 1) for row in rows]
    each = [tokens if row is None else tokens // row.shape[1] for row in rows]
    _norm[(tokens, batch)](
        x, added, *rows, total, out, tokens, *x.stride(), *(added.stride() if added is not None else (0, 0, 0)),
        *spread, *steps, *each, eps, DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=8 if dim > 2048 else 4,
    )  # fmt: skip


@triton.jit
def _norm(
    x, added, gate, scale, shift, total, out, tokens, x_video, x_token, x_value, added_video, added_token, added_value,
    gate_video, scale_video, shift_video, gate_row, scale_row, shift_row, gate_tokens, scale_tokens, shift_tokens, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, video = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    place = (video * tokens + token) * DIM + at
    row = tl.load(x + video * x_video + token * x_token + at * x_value, inside, 0.0).to(tl.float32)
    if added is not None:
        more = tl.load(added + video * added_video + token * added_token + at * added_value, inside, 0.0).to(tl.float32)
        if gate is not None:
            more *= tl.load(gate + video * gate_video + token // gate_tokens * gate_row + at, inside, 0.0)
        narrow = (row + more).to(total.dtype.element_ty)
        tl.store(total + place, narrow, inside)
        row = narrow.to(tl.float32)
    centred = tl.where(inside, row - tl.sum(row) / DIM, 0.0)
    row = centred * tl.rsqrt(tl.sum(centred * centred) / DIM + eps)
    scaled = row * tl.load(scale + video * scale_video + token // scale_tokens * scale_row + at, inside, 0.0)
    row = scaled + tl.load(shift + video * shift_video + token // shift_tokens * shift_row + at, inside, 0.0)
    tl.store(out + place, row.to(out.dtype.element_ty), inside)


class Turn(NamedTuple):
    """How the keys or queries of a pass are made of what was projected: RMSNorm over all heads, then RoPE.

    weight, eps: of the norm. rotation: of each token, complex64, [B or 1, S, 1, D / 2].
    """

    weight: torch.Tensor
    eps: float
    rotation: torch.Tensor

    def turned(self, heads: torch.Tensor) -> torch.Tensor:
        """Those of projected [B, S, H, D]."""
        out = torch.empty_like(heads, memory_format=torch.contiguous_format)
        _put(heads, self, (out,))
        return out

    def write(self, parts: Parts, places: Places, key: torch.Tensor, value: torch.Tensor | None) -> None:
        """Write projected keys and values, [B, S, H, D] each, into their places in the parts of a layer.

        value: None where these are there already.
        """
        if isinstance(places, torch.Tensor):
            assert value is not None
            for kind, fresh, turn in ((0, key, self), (1, value, None)):
                _put(fresh, turn, tuple(part[kind] for part in parts), places)
            return
        for source, slot, count in places:
            here = self._replace(rotation=self.rotation[:, source : source + count])
            for kind, fresh, turn in ((0, key, here), (1, value, None)):
                if fresh is None:
                    continue
                _put(
                    fresh[:, source : source + count], turn, tuple(part[kind, :, slot : slot + count] for part in parts)
                )

    def read(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """What parts [B, S, H, ·] hold, in a dtype: a view of them if it is theirs."""
        return widened(parts, dtype)


def _put(heads: torch.Tensor, turn: Turn | None, parts: Parts, slots: torch.Tensor | None = None) -> None:
    """Store [B, S, H, D] in parts, normalised and turned before if there is a turn.

    slots: of each token in the parts, int64 [S]; None: parts are of the tokens' size.
    """
    form, into, scales = _told_apart(parts)
    if form == MODEL and turn is None:
        if slots is None:
            into.copy_(heads)
        else:
            put_at(slots, into, heads)
        return
    batch, tokens, count, dim = heads.shape
    weight = rotation = None
    eps, rotation_strides = 0.0, (0, 0)
    if turn is not None:
        weight, eps = turn.weight, turn.eps
        rotation = torch.view_as_real(turn.rotation.expand(batch, *turn.rotation.shape[1:]))
        rotation_strides = rotation.stride()[:2]
    _turn[(tokens, batch)](
        heads, weight, rotation, into, scales, slots, eps,
        *heads.stride(), *rotation_strides, *into.stride()[:2], *scales.stride()[:2],
        HEADS=count, DIM=dim, BLOCK_HEADS=triton.next_power_of_2(count), BLOCK=triton.next_power_of_2(dim), FORM=form,
        num_warps=8 if count * dim > 2048 else 4,
    )  # fmt: skip


@triton.jit
def _turn(
    heads, weight, rotation, into, scales, slots, eps, video_stride, token_stride, head_stride, value_stride,
    rotation_video, rotation_token, into_video, into_token, scales_video, scales_token, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    token, video = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, at = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (at < DIM)
    place = heads + video * video_stride + token * token_stride
    row = tl.load(place + head * head_stride + at * value_stride, inside, 0.0).to(tl.float32)
    if weight is not None:
        row = row * tl.rsqrt(tl.sum(row * row) / (HEADS * DIM) + eps)
        row = row * tl.load(weight + head * DIM + at, inside, 0.0).to(tl.float32)
        # Neighbouring values are the two parts of a complex number, and so are cosine and sine.
        x, y = tl.split(tl.reshape(row, (BLOCK_HEADS, BLOCK // 2, 2)))
        pair = tl.arange(0, BLOCK // 2)[None, :]
        place = rotation + video * rotation_video + token * rotation_token + 2 * pair
        cosine, sine = tl.load(place, 2 * pair < DIM, 0.0), tl.load(place + 1, 2 * pair < DIM, 0.0)
        row = tl.reshape(tl.join(x * cosine - y * sine, x * sine + y * cosine), (BLOCK_HEADS, BLOCK))
    if slots is not None:
        token = tl.load(slots + token)
    place = into + video * into_video + token * into_token + head * DIM + at
    if FORM == 0:
        tl.store(place, row.to(into.dtype.element_ty), inside)
    elif FORM == 1:
        tl.store(place, _float8_code(row), inside)
    else:
        scale = tl.maximum(tl.max(tl.abs(row), axis=1, keep_dims=True), 1e-12) / 127
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        tl.store(scales + video * scales_video + token * scales_token + head, scale, head < HEADS)
        # Adding 1.5 * 2^23 leaves no bits for a fraction: the nearest integer, of two the even one.
        tl.store(place, ((row / scale + 12582912.0) - 12582912.0).to(tl.int8), inside)


@triton.jit
def _float8_code(x):
    """float8_e4m3fn of float32, rounded to nearest even and cut off at 448, on any GPU; not a number stays so."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    normal = (size + ((7 - 127) << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    code = tl.where(size < (121 << 23), small, tl.minimum(normal, 0x7E))
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


def quantised(x: torch.Tensor, gelu: bool = False) -> Rows:
    """The rows of [S, K], or their GELU, in float8, and the scale of each: see `products.quantised`."""
    rows, dim = x.shape
    codes = torch.empty(rows, dim, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    _quantise[(rows,)](
        x, codes.view(torch.uint8), scales, *x.stride(), DIM=dim, BLOCK=triton.next_power_of_2(dim), GELU=gelu,
        num_warps=4 if dim <= 2048 else 8 if dim <= 8192 else 16,
    )  # fmt: skip
    return Rows(codes, scales)


@triton.jit
def _quantise(x, codes, scales, x_row, x_value, DIM: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(x + row * x_row + at * x_value, inside, 0.0).to(tl.float32)
    if GELU:
        slope = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value * (1.0 - 1.0 / (tl.exp(2.0 * slope) + 1.0))
    scale = tl.maximum(tl.max(tl.abs(value)), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(codes + row * DIM + at, _float8_code(value / scale), inside)


def widened(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """What parts [B, S, H, ·] hold, in a dtype: a view of them if it is theirs."""
    form, codes, scales = _told_apart(parts)
    if form == MODEL:
        return codes
    batch, count = len(codes), codes[0].numel()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _widen[(triton.cdiv(count, WIDENED), batch)](
        codes, scales, out, count, codes.stride(0), scales.stride(0),
        WIDTH=codes.shape[-1], FORM=form, BLOCK=WIDENED,
    )  # fmt: skip
    return out


def _told_apart(parts: Parts) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The form of parts, their codes and their scales, or something in the place of these. Kernels see float8 as bytes."""
    form = FORMS.get(parts[0].dtype, MODEL)
    codes = parts[0].view(torch.uint8) if form == FLOAT8 else parts[0]
    return form, codes, parts[1] if form == INT8 else codes


@triton.jit
def _widen(
    codes, scales, out, count, codes_video, scales_video, WIDTH: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    video = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    code = tl.load(codes + video * codes_video + at, inside, 0)
    if FORM == 1:
        wide = code.to(tl.int32)
        size = wide & 0x7F
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        value = tl.where(size == 0x7F, float("nan"), value)
        value = tl.where(wide >= 0x80, -value, value)
    else:
        value = code.to(tl.float32) * tl.load(scales + video * scales_video + at // WIDTH, inside, 0.0)
    tl.store(out + video * count + at, value.to(out.dtype.element_ty), inside)


def check(device: torch.device | str) -> None:
    """Make a few numbers with every kernel on a device, and compare them with those of the plain path.

    Raises RuntimeError where they are others, and whatever Triton raises where it cannot make code for the device.
    """
    random = torch.Generator().manual_seed(0)
    x, added = (torch.randn(1, 3, 32, generator=random).to(device, torch.float16) for _ in range(2))
    gate, scale, shift = (torch.randn(1, 1, 32, generator=random).to(device) for _ in range(3))
    total, out = summed_and_normed(x, added, gate, scale, shift, 1e-6)
    _compare("sums", total, x.float() + added.float() * gate)
    _compare("norms", out, F.layer_norm(total.float(), (32,), eps=1e-6) * scale + shift)
    heads, rotation = (
        x.unflatten(2, (2, 16)),
        rotary_rotations(16, 5, 3, 1, 1, torch.complex64)[None, :, None].to(device),
    )
    turn = Turn(shift[0, 0].half(), 1e-6, rotation)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * turn.weight.float()
    turned = rotate(wide.unflatten(2, (2, 16)), rotation)
    for name, codec in CODECS.items():
        widths = codec(torch.float16).widths(16)
        parts = tuple(torch.zeros(2, 1, 3, 2, width, device=device).to(kept) for width, kept in widths)
        turn.write(parts, [(0, 1, 2), (2, 0, 1)], heads, heads)
        keys, values = (turn.read(tuple(part[kind] for part in parts), torch.float16) for kind in (0, 1))
        _compare(f"keys as {name}", keys.roll(-1, 1), turned, CLOSE[name])
        _compare(f"values as {name}", values.roll(-1, 1), heads, CLOSE[name])

    codes, scales = quantised(x[0], gelu=True)
    plain = products.quantised(x[0], gelu=True)
    _compare("rows", codes.float() * scales, plain.codes.float() * plain.scales, CLOSE["float8"])


def _compare(what: str, made: torch.Tensor, plain: torch.Tensor, close: float = CLOSE["model"]) -> None:
    error = float((made.float() - plain.float()).abs().amax() / plain.float().abs().amax().clamp(min=1))
    if not error <= close:
        raise RuntimeError(f"its {what} are off by {error:.2g} of the largest")
