"""From one prompt to another over several chunks."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..config import check_choice

CURVES = ("linear", "slerp")


def blend_prompts(old: torch.Tensor, new: torch.Tensor, chunks: int, curve: str = "linear") -> list[torch.Tensor]:
    """The embeddings of each of `chunks` chunks that lead from one prompt to another: the first is the old, the last the new.

    Source: Krea Realtime's prompt changes. Over one chunk there is nothing between: it is the new prompt.

    old, new: embeddings [B, L, D] of one dtype; the shorter one is padded with zeros, as prompts are.
    curve: "linear": on a straight line. "slerp": each token on an arc, so that it keeps its length half way.

    Returns embeddings [B, L, D] in that dtype. Raises ValueError for another curve.
    """
    check_choice("the curve of a blend", curve, CURVES)
    if chunks == 1:
        return [new]
    tokens = max(old.shape[1], new.shape[1])
    old, new = (pad(embeds, (0, 0, 0, tokens - embeds.shape[1])) for embeds in (old, new))
    between = torch.lerp if curve == "linear" else _slerp
    return [old, *(between(old, new, share) for share in torch.linspace(0, 1, chunks).to(new)[1:-1]), new]


def _slerp(old: torch.Tensor, new: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    start, end, share = old.float(), new.float(), share.float()
    cosine = torch.cosine_similarity(start, end, dim=-1).clamp(-1, 1).unsqueeze(-1)
    angle = cosine.acos()
    arc = (start * ((1 - share) * angle).sin() + end * (share * angle).sin()) / angle.sin()
    # Between tokens that are parallel or opposite, or of which one is padding, there is no arc.
    apart = (cosine.abs() < 0.9995) & start.any(-1, True) & end.any(-1, True)
    return torch.where(apart, arc, torch.lerp(start, end, share)).to(new.dtype)
