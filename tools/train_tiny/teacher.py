"""Teacher forcing: all chunks of a clip in one pass of a stock WanTransformer3DModel's modules.

The sequence is the clean clip followed by a noisy copy. Clean chunks see the clean chunks in their window, as the context
passes write them into the cache; a noisy chunk sees itself and the clean chunks before it, as a denoising step does. So one
pass trains every chunk on exactly the sums that sampling through the rolling cache makes, at a timestep of its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from rolling_kv.geometry import TEXT_LENGTH
from rolling_kv.rope import rotary_angles
from rolling_kv.wan.inputs import time_sinusoid


class Prompts:
    """Text embeddings for a batch, each clip with up to two prompts, and which chunk reads which.

    embeddings: [B, L, D]: the tokens of both prompts, then one zero token that stands for all padding.
    bias: [B, chunks, L], added to the attention scores. The engine pads every prompt with zeros to 512 tokens and attends
    them. Equal keys with equal values act as one key whose score is higher by the logarithm of their number.
    """

    def __init__(self, embeddings: torch.Tensor, lengths: torch.Tensor, second: torch.Tensor, padding: float = 1.0):
        """embeddings: [B, 1 or 2, l, D]; lengths: [B, 1 or 2] tokens; second: [B, chunks] true where the second holds.

        padding: 0..1, grows the weight of the padding in the first steps of training, when it would drown the words.
        """
        batch, _, length, dim = embeddings.shape
        used = torch.arange(length) < lengths[..., None]
        chosen = torch.stack([~second, second], 2)[:, :, : embeddings.shape[1]]
        bias = torch.where(chosen[..., None] & used[:, None], 0.0, -math.inf).flatten(2)
        count = torch.where(second, lengths[:, -1:], lengths[:, :1])
        pads = padding * torch.log(TEXT_LENGTH - count.float())
        self.bias = torch.cat([bias, pads[..., None]], 2)
        self.embeddings = torch.cat([embeddings.flatten(1, 2), embeddings.new_zeros(batch, 1, dim)], 1)


def predict(
    model: nn.Module,
    clean: torch.Tensor | None,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    prompts: Prompts,
    window: int,
    chunk: int = 3,
    hidden: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Predicted flow [B, 16, F, h, w] for `noisy`, given the `clean` context of the same shape.

    timesteps: [B, chunks], of the noisy chunks; the clean ones stand at 0. window: chunks, counting the current one.
    A first chunk alone needs no context: clean None. hidden: takes the noisy chunks' states [B, chunks, tokens, D] after
    each block.
    """
    batch, _, frames, height, width = noisy.shape
    chunks = frames // chunk
    copies = 1 if clean is None else 2
    layout = Layout(
        batch, chunks, copies, min(window, chunks), chunk * height * width // 4, model.config.num_attention_heads
    )
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32

    x = noisy if clean is None else torch.cat([clean, noisy], 2)
    x = model.patch_embedding(x).flatten(2).transpose(1, 2)
    x = x.float().reshape(batch, copies * chunks, layout.tokens, -1)
    angles = rotary_angles(model.config.attention_head_dim, 0, frames, height // 2, width // 2)
    angles = angles.repeat_interleave(2, 1).view(chunks, layout.tokens, 1, -1).repeat(copies, 1, 1, 1)
    rotation = angles.cos().to(dtype), angles.sin().to(dtype) * torch.tensor([-1.0, 1.0]).repeat(angles.shape[-1] // 2)
    rotation = rotation[0], rotation[1].to(dtype)

    embedder = model.condition_embedder
    times = timesteps if clean is None else torch.cat([torch.zeros_like(timesteps), timesteps], 1)
    times = times.flatten()
    times = embedder.time_embedder(time_sinusoid(times, model.config.freq_dim).float()).float()
    modulation = embedder.time_proj(F.silu(times)).float().view(batch, copies * chunks, 1, 6, -1)
    text = embedder.text_embedder(prompts.embeddings)
    masks = layout.mask().to(dtype), prompts.bias.repeat(1, copies, 1)[:, :, None, None].to(dtype)
    for block in model.blocks:
        x = block_forward(block, x, text, modulation, rotation, masks, layout)
        if hidden is not None:
            hidden.append(x[:, -chunks:])

    times = times.view(batch, copies * chunks, 1, 1, -1)[:, -chunks:]
    shift, scale = (model.scale_shift_table + times).unbind(3)
    x = model.proj_out(_modulate(x[:, -chunks:], shift, scale, model.norm_out.eps, dtype))
    x = x.view(batch, frames, height // 2, width // 2, 2, 2, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(noisy.shape)


class Layout(NamedTuple):
    """Sizes of the sequence: `copies` (clean and noisy) of `chunks` of `tokens`; `window` chunks are attended to, the current one included."""

    batch: int
    chunks: int
    copies: int
    window: int
    tokens: int
    heads: int

    def mask(self) -> torch.Tensor:
        """Bias [copies * chunks, 1, 1, window * tokens]: the first chunks have fewer chunks before them."""
        missing = torch.arange(self.window)[None] + torch.arange(self.chunks)[:, None] < self.window - 1
        bias = torch.zeros(missing.shape).masked_fill(missing, -math.inf)
        return bias.repeat_interleave(self.tokens, 1).repeat(self.copies, 1)[:, None, None]

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """What each chunk attends to: [B, copies * chunks, tokens, …] to [B, copies * chunks, window * tokens, …]."""
        clean = torch.cat([x.new_zeros(self.batch, self.window - 1, *x.shape[2:]), x[:, : self.chunks]], 1)
        past = [
            clean[:, i : i + self.chunks].repeat(1, self.copies, *[1] * (x.ndim - 2)) for i in range(self.window - 1)
        ]
        return torch.cat([*past, x], 2)


def plain_block(block, x, text, modulation, rotation, masks, layout):
    dtype = masks[0].dtype
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + modulation).unbind(3)
    inner = _modulate(x, shift, scale, block.norm1.eps, dtype)
    attn = block.attn1
    query = _rotate(_heads(_rms(attn.norm_q, attn.to_q(inner)), layout), rotation)
    key = layout.windows(_rotate(_heads(_rms(attn.norm_k, attn.to_k(inner)), layout), rotation))
    value = layout.windows(_heads(attn.to_v(inner), layout))
    x = x + _attend(attn, query, key, value, masks[0]) * gate

    attn = block.attn2
    query = _heads(_rms(attn.norm_q, attn.to_q(block.norm2(x))), layout)
    key = _heads(_rms(attn.norm_k, attn.to_k(text)), layout)[:, None]
    x = x + _attend(attn, query, key, _heads(attn.to_v(text), layout)[:, None], masks[1])

    return x + block.ffn(_modulate(x, ffn_shift, ffn_scale, block.norm3.eps, dtype)) * ffn_gate


block_forward = plain_block


def compile_blocks() -> None:
    """From now on a compiled forward of the blocks, once for each shape of batch, where gradients are needed."""
    global block_forward
    torch._dynamo.config.recompile_limit = 32
    compiled = torch.compile(plain_block, dynamic=False)

    def forward(*arguments):
        return compiled(*arguments) if torch.is_grad_enabled() else plain_block(*arguments)

    block_forward = forward


def _modulate(x, shift, scale, eps, dtype):
    return torch.addcmul(shift.to(dtype), F.layer_norm(x, x.shape[-1:], eps=eps).to(dtype), 1 + scale.to(dtype))


def _rms(norm, x):
    # torch's fused kernel wants the weight in the dtype of its input.
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def _heads(x, layout):
    return x.unflatten(-1, (layout.heads, -1))


def _rotate(x, rotation):
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * rotation[0], swapped, rotation[1])


def _attend(attn, query, key, value, bias):
    """Attention written out: on a CPU its backward pass is faster than the fused kernel's."""
    query, key, value = query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    out = (scores + bias).softmax(-1) @ value
    return attn.to_out[0](out.transpose(2, 3).flatten(3))
