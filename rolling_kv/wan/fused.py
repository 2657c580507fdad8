"""A Wan block in fewer passes over memory: the stock block's arithmetic, with its temporaries fused away.

A stock block spends a tenth of its time beside its matrix products on a CPU, and a fifth on a GPU in half precision, where
most of its kernels only change a dtype. The modulation that follows a norm is an affine map, so it can be the norm's own;
the gate of a residual is one fused multiply-add; what is freshly made can be changed in place. Results agree with the stock
block's to rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from ..config import ExecutionConfig
from ..devices import checked_kernels
from ..platforms import AVX2
from .context import PassContext
from .execution import eager
from .framewise import modulated
from .offloaded import BlockHook, blocks_device

logger = logging.getLogger(__name__)

ONEDNN_LINEAR: Callable[..., torch.Tensor] | None = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
CUBLAS_LINEAR: Callable[..., torch.Tensor] | None = getattr(torch, "_addmm_activation", None)
PIECE = 2**16
"""Values of which a CPU's core keeps two copies in a cache of its own."""


def fused_forwards(blocks, kernels: Any = None) -> list[tuple[torch.nn.Module, Callable]]:
    """Each module of the blocks that gets a fused `forward`, and that forward. Says once if blocks are left out.

    kernels: the module `kernels`, where blocks in half precision use it.
    """
    fusable = [block for block in blocks if may_fuse(block)]
    if len(fusable) < len(blocks):
        _warn_once(
            f"{len(blocks) - len(fusable)} of {len(blocks)} blocks run as diffusers has them, a little slower: another "
            "library has put a forward or a hook of its own on them"
        )
    handed = Handed()
    # Weights that a hook brings in are not there yet while the block before computes.
    following = [after if may_fuse(after) and not after._forward_pre_hooks else None for after in blocks[1:]] + [None]
    after = {id(block): next_block for block, next_block in zip(blocks, following)}
    pairs = [(block, fused_forward(block, block.forward, kernels, handed, after[id(block)])) for block in fusable]
    return pairs + [(block.ffn, fused_feed_forward(block.ffn, block.ffn.forward)) for block in fusable]


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class Handed:
    """What a block has made for the one after it, in the kernel of its own last sum: its first norm, and its modulation."""

    def __init__(self):
        self._kept: tuple[torch.Tensor, Any] | None = None

    def give(self, hidden_states: torch.Tensor, made: Any) -> None:
        """Keep what was made of a block's result."""
        self._kept = hidden_states, made

    def take(self, hidden_states: torch.Tensor) -> Any:
        """What was made of this very tensor; None where a block is given another one."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] is hidden_states else None


def fused_forward(block, stock_forward, kernels: Any = None, handed: Handed | None = None, following: Any = None):
    """A `forward` for one stock `WanTransformerBlock`; what is neither float32 nor `fuses_half` goes to `stock_forward`.

    handed: between the blocks of a transformer. following: the block after it, if what is made for it will be taken.
    """
    handed = handed or Handed()

    def forward(hidden_states, encoder_hidden_states, temb, rotary_emb):
        """hidden_states: [B, S, dim]; temb: modulation [B, 6, dim]; where `fuses_half`, [B, f, 6, dim] too.

        Returns [B, S, dim]; the inputs are left alone.
        """
        if fuses_half(hidden_states):
            return half_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        if hidden_states.dtype != torch.float32:
            return stock_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
        attended = block.attn1(modulated_norm(hidden_states, block.norm1, scale, shift), None, None, rotary_emb)
        hidden_states = torch.addcmul(hidden_states, attended, gate)
        hidden_states += block.attn2(block.norm2(hidden_states), encoder_hidden_states, None, None)
        fed = block.ffn(modulated_norm(hidden_states, block.norm3, ff_scale, ff_shift))
        return hidden_states.addcmul_(fed, ff_gate)

    def half_forward(hidden_states, encoder_hidden_states, temb, rotary_emb):
        if kernels is not None:
            taken = handed.take(hidden_states)
            shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation_of(block, temb) if taken is None else taken[1]
            normed = kernels.normed(hidden_states, scale, shift, block.norm1.eps) if taken is None else taken[0]
            attended, affine = block.attn1(normed, None, None, rotary_emb), block.norm2
            hidden_states, normed = kernels.summed_and_normed(
                hidden_states, attended, gate, affine.weight[None], affine.bias[None], affine.eps
            )
            attended = block.attn2(normed, encoder_hidden_states, None, None)
            hidden_states, normed = kernels.summed_and_normed(
                hidden_states, attended, None, ff_scale, ff_shift, block.norm3.eps
            )
            if following is None:
                return narrowed_sum(hidden_states, block.ffn(normed), ff_gate, out=hidden_states)
            rows = modulation_of(following, temb)
            hidden_states, normed = kernels.summed_and_normed(
                hidden_states, block.ffn(normed), ff_gate, rows[1], rows[0], following.norm1.eps
            )
            handed.give(hidden_states, (normed, rows))
            return hidden_states
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation_of(block, temb)
        attended = block.attn1(half_modulated_norm(hidden_states, block.norm1, scale, shift), None, None, rotary_emb)
        hidden_states = narrowed_sum(hidden_states, attended, gate)
        hidden_states += block.attn2(block.norm2(hidden_states), encoder_hidden_states, None, None)
        fed = block.ffn(half_modulated_norm(hidden_states, block.norm3, ff_scale, ff_shift))
        return narrowed_sum(hidden_states, fed, ff_gate, out=hidden_states)

    return forward


def fuses_half(x: torch.Tensor) -> bool:
    """Whether what is made of `x` is fused in half precision: only there where sums into a narrower dtype make no copies."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.device.type in ("cuda", "meta") and not torch.is_grad_enabled()


def fused_feed_forward(ffn, stock_forward):
    """A `forward` for a block's `ffn` with the GELU computed where the first product leaves its results, or with `gelu_`.

    torch offers the fused products of oneDNN and of cuBLASLt to its own compiler only, as private operators. Where they are
    missing, or where anything (LoRA, weight storage) stands between the layers, `stock_forward` runs.
    """
    gelu, down = ffn.net[0], ffn.net[-1]
    up: Any = getattr(gelu, "proj", None)
    known = type(up) is torch.nn.Linear and getattr(gelu, "approximate", None) == "tanh" and len(ffn.net) == 3

    def forward(x, *args, **kwargs):
        """x: [B, S, dim]. Returns [B, S, dim]."""
        known_here = known and x.dtype == up.weight.dtype and is_plain(gelu) and is_plain(up)
        if known_here and up.bias is not None and CUBLAS_LINEAR is not None and fuses_half(x):
            return down(
                CUBLAS_LINEAR(up.bias, x.flatten(0, -2), up.weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])
            )
        fused = known_here and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if ONEDNN_LINEAR is None or not fused:
            return stock_forward(x, *args, **kwargs)
        if AVX2:  # oneDNN's takes nearly three times as long there
            return down(gelu_(ONEDNN_LINEAR(x, up.weight, up.bias, "none", [], "")))
        return down(ONEDNN_LINEAR(x, up.weight, up.bias, "gelu", [], "tanh"))

    return forward


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """GELU with tanh of a freshly made contiguous tensor, in place: (1 + tanh(y)) / 2 is sigmoid(2 y), which takes an exponential.

    It goes piece by piece, so that memory is read and written once.
    """
    linear = 2 * math.sqrt(2 / math.pi)
    factor = x.new_tensor(linear)
    quarter = 64 * -(
        -x.numel() // 256
    )  # in whole vectors: forecasts do not count what a piece takes, which shows if x is small
    for piece in x.view(-1).split(min(PIECE * torch.get_num_threads(), quarter)):
        piece.mul_(torch.addcmul(factor, piece, piece, value=0.044715 * linear).mul_(piece).sigmoid_())
    return x


def last_block_forward(block, block_forward, context: PassContext):
    """A `forward` for the last block: `block_forward`, or in a pass that ends with its keys only what these need."""

    @partial(torch.compiler.disable, recursive=False)
    def forward(hidden_states, encoder_hidden_states, temb, rotary_emb):
        """hidden_states: [B, S, dim]; temb: modulation [B, 6, dim] or [B, f, 6, dim]. Returns [B, S, dim]."""
        if not context.running.keys_only:
            return block_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        write_keys(hidden_states, temb, rotary_emb)
        return hidden_states

    @eager
    def write_keys(hidden_states, temb, rotary_emb) -> None:
        shift, scale = (block.scale_shift_table + temb.float())[..., :2, :].chunk(2, dim=-2)
        halves = fuses_half(hidden_states) and not context.execution.exact
        if temb.ndim == 4 and not halves:
            normed = modulated(block.norm1(hidden_states.float()), scale, shift)
        elif context.execution.exact:
            normed = block.norm1(hidden_states.float()) * (1 + scale) + shift
        elif halves and context.kernels is not None:
            normed = context.kernels.normed(hidden_states, 1 + scale, shift, block.norm1.eps)
        elif halves:
            normed = half_modulated_norm(hidden_states, block.norm1, 1 + by_frame(scale), by_frame(shift))
        else:
            normed = modulated_norm(hidden_states.float(), block.norm1, scale, shift)
        block.attn1.processor.write_of(block.attn1, normed.type_as(hidden_states), rotary_emb)

    return forward


def may_fuse(block) -> bool:
    """Whether a fused `block` would pass over nothing of somebody else's, such as a hook that brings its weights in."""
    return all(map(is_plain, (block, block.norm1, block.norm3, block.ffn)))


def kernels_for(execution: ExecutionConfig, blocks) -> Any:
    """The module `kernels`, where passes in half precision through these blocks use it; None where they do without."""
    device = blocks_device(blocks)
    if execution.plain or execution.exact or execution.compile or not all(map(_has_wans_norms, blocks)):
        return None
    return _load_kernels() if kernels_run_on(device) else None


def _has_wans_norms(block) -> bool:
    """Whether the norms of a block are Wan's, and run nothing of somebody else's: kernels stand in the place of these."""
    over_heads = [attention.norm_k for attention in (block.attn1, block.attn2)] + [block.attn1.norm_q]
    affine = getattr(block.norm2, "weight", None) is not None and getattr(block.norm2, "bias", None) is not None
    known = affine and all(type(norm) is torch.nn.RMSNorm and norm.weight is not None for norm in over_heads)
    return known and may_fuse(block) and all(map(is_plain, (block.norm2, *over_heads)))


def kernels_run_on(device: torch.device) -> bool:
    """Whether the Triton kernels of passes can be used on a device, see `devices.checked_kernels`."""
    return checked_kernels(_load_kernels, device) is not None


def _load_kernels() -> ModuleType:
    from . import kernels

    return kernels


def is_linear(module) -> bool:
    """Whether a module is torch's Linear with a bias, and nothing of somebody else's."""
    return type(module) is torch.nn.Linear and module.bias is not None and is_plain(module)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else but what brings its weights in.

    Libraries that take their hooks off often leave the class's own forward behind, as an attribute of the instance.
    """
    own = vars(module).get("forward")
    left_behind = getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is type(module).forward
    hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
    return (own is None or left_behind) and all(isinstance(hook, BlockHook) for hook in hooks)


def modulated_norm(x: torch.Tensor, norm, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights of [B, S, dim], then x * (1 + scale) + shift; scale and shift are [B or 1, 1, dim]."""
    if scale.shape[0] == 1:
        return F.layer_norm(x, norm.normalized_shape, 1 + scale[0, 0], shift[0, 0], norm.eps)
    return torch.addcmul(shift, F.layer_norm(x, norm.normalized_shape, eps=norm.eps), 1 + scale)


def modulation_of(block, temb: torch.Tensor) -> list[torch.Tensor]:
    """The six rows of a block's modulation, to both scales of which 1 is added, [B, R, dim] each; see `by_frame`."""
    modulation = block.scale_shift_table + temb.float()
    modulation[..., 1::3, :].add_(1)
    return [by_frame(row) for row in modulation.chunk(6, dim=-2)]


def by_frame(row: torch.Tensor) -> torch.Tensor:
    """A row of a modulation, [B, 1, dim], or one for each frame, [B, f, 1, dim], as [B, R, dim]."""
    return row.squeeze(-2) if row.ndim == 4 else row


def half_modulated_norm(x: torch.Tensor, norm, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """LayerNorm of [B, S, dim] in float32, then x * scale + shift as it is narrowed.

    scale, shift: [B or 1, R, dim], R rows of which each is for as many tokens as the others.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.addcmul(shift[:, :, None], _split(norm(x.float()), shift), scale[:, :, None], out=_split(out, shift))
    return out


def _split(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, S, dim] as [B, R, S / R, dim]. rows: [B or 1, R, dim]."""
    return tokens.unflatten(1, (rows.shape[1], -1))


def narrowed_sum(
    x: torch.Tensor, added: torch.Tensor, gate: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x + added * gate in the gate's float32, in the dtype of `x`. gate: as `half_modulated_norm` takes scale and shift.

    It is contiguous whatever `x` is: the patch embedding's convolution may leave the tokens of a channel side by side, and a
    sum would hand that on to every block.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    torch.addcmul(_split(x, gate), _split(added, gate), gate[:, :, None], out=_split(out, gate))
    return out


def rms_norm_(x: torch.Tensor, norm) -> torch.Tensor:
    """RMSNorm over the last dim of a freshly made [B, S, dim], in place: two passes instead of torch's four on a CPU."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()
    return x.mul_(inverse).mul_(norm.weight)
