"""Wan's three-dimensional rotary position embedding, for any frame of a video of any length.

Scores depend only on the difference of positions, so absolute frame indices need no table and no re-basing: the angles
of a chunk are computed in float64 when it is made.
"""

from __future__ import annotations

import torch

THETA = 10000.0


def rotate(heads: torch.Tensor, rotation: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
    """Apply RoPE to [B, S, H, D]: neighbouring dims are the two parts of a complex number.

    rotation: unit complex numbers, [1, S, 1, D/2], or their real and imaginary parts, [1, S, 1, D/2, 2]. Their precision
    is that of the arithmetic; the dtype of `heads` is kept.
    overwrite: nobody else holds `heads`: they are turned in place where that can be, to the same bits.
    """
    pairs = heads.to(rotation.real.dtype if rotation.is_complex() else rotation.dtype).unflatten(-1, (-1, 2))
    if rotation.is_complex():
        numbers = torch.view_as_complex(pairs)
        fresh = (overwrite or pairs.dtype != heads.dtype) and not torch.is_grad_enabled()
        turned = torch.view_as_real(numbers.mul_(rotation) if fresh else numbers * rotation)
    else:
        (x, y), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1)
    return turned.flatten(-2).type_as(heads)


def rotations(angles: torch.Tensor) -> torch.Tensor:
    """Unit complex numbers (complex128) of angles in float64."""
    return torch.polar(torch.ones_like(angles), angles)


def rotary_angles(head_dim: int, start_frame: float, frames: int, height: int, width: int) -> torch.Tensor:
    """Angles of each token's position in float64, [frames * height * width, head_dim / 2], on the CPU.

    start_frame: absolute latent frame; cuts may put it between two. height, width: in tokens.
    """
    return _laid_out(_axes(head_dim, start_frame, frames, height, width))


def rotary_rotations(
    head_dim: int, start_frame: float, frames: int, height: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """`rotations` of `rotary_angles` in a complex dtype, with the sines of each frame, row and column computed once."""
    axes = _axes(head_dim, start_frame, frames, height, width)
    return _laid_out([rotations(angles).to(dtype) for angles in axes])


def _axes(head_dim: int, start_frame: float, frames: int, height: int, width: int) -> list[torch.Tensor]:
    """Angles of each frame, of each row and of each column, [count, dims] in float64."""
    time, space = _split(head_dim)
    counted = [(start_frame, frames, time), (0, height, space), (0, width, space)]
    return [
        torch.outer(torch.arange(start, start + count, dtype=torch.float64), _frequencies(dims))
        for start, count, dims in counted
    ]


def _laid_out(axes: list[torch.Tensor]) -> torch.Tensor:
    """Every token has what its frame, its row and its column have: [count, dims] each to [tokens, dims together]."""
    counts = [len(part) for part in axes]
    parts = []
    for axis, part in enumerate(axes):
        view = [1, 1, 1, part.shape[1]]
        view[axis] = counts[axis]
        parts.append(part.view(view).expand(*counts, part.shape[1]))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def time_shift_angles(head_dim: int, frames: float) -> torch.Tensor:
    """Angles that move any token by `frames` latent frames in time, [head_dim / 2], float64."""
    time, space = _split(head_dim)
    return torch.cat([frames * _frequencies(time), torch.zeros(2 * space, dtype=torch.float64)])


def _split(head_dim: int) -> tuple[int, int]:
    """Complex dims of time, and of height and width each."""
    space = head_dim // 6
    return head_dim // 2 - 2 * space, space


def _frequencies(dims: int) -> torch.Tensor:
    return 1.0 / THETA ** (torch.arange(0, 2 * dims, 2, dtype=torch.float64) / (2 * dims))
