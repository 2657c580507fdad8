"""A timestep for each frame of a pass: the modulation of a Wan block stays one row a frame.

Stock diffusers takes a timestep for each token, and every block then makes six tensors as large as its input of them. A
frame's tokens all share theirs, so here the tokens are viewed frame by frame and the rows are broadcast, in the stock
block's order of arithmetic: with equal timesteps the result is that of a single one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def framewise_forward(
    block, block_forward, plain: bool, takes_frames: Callable[[torch.Tensor], bool] = lambda x: False
):
    """A `forward` for a `WanTransformerBlock`: `block_forward` unless the modulation has a row for each frame.

    plain: whether `block_forward` runs nothing of somebody else's; otherwise it always runs, with the rows repeated for
        each token as stock diffusers has them.
    takes_frames: whether `block_forward` takes a modulation with a row for each frame by itself, where it is given such
        hidden states.
    """

    def forward(hidden_states, encoder_hidden_states, temb, rotary_emb):
        """hidden_states: [B, S, dim]; temb: modulation [B, 6, dim] or [B, f, 6, dim]. Returns [B, S, dim]."""
        if temb.ndim == 3 or takes_frames(hidden_states):
            return block_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        if not plain:
            temb = temb.repeat_interleave(hidden_states.shape[1] // temb.shape[1], dim=1)
            return block_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=2)
        normed = modulated(block.norm1(hidden_states.float()), scale, shift).type_as(hidden_states)
        attended = block.attn1(normed, None, None, rotary_emb)
        hidden_states = gated(hidden_states, attended, gate)
        normed = block.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + block.attn2(normed, encoder_hidden_states, None, None)
        normed = modulated(block.norm3(hidden_states.float()), ff_scale, ff_shift).type_as(hidden_states)
        return gated(hidden_states, block.ffn(normed).float(), ff_gate)

    return forward


def modulated(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """normed * (1 + scale) + shift for tokens [B, S, dim]; scale and shift have a row for each frame, [B, f, 1, dim]."""
    return (normed.unflatten(1, (scale.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


def gated(hidden_states: torch.Tensor, added: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """hidden_states + added * gate for tokens [B, S, dim], with a gate for each frame, [B, f, 1, dim]."""
    weighed = (added.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
    return (hidden_states.float() + weighed).type_as(hidden_states)
