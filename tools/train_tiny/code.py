"""A linear code with the shape of the VAE's latents: the target that makes encoder, decoder and transformer independent.

A Wan latent cell describes a block of 4 frames x 8x8 pixels (the first latent frame: 1 x 8x8). The principal components of
such blocks are a 16-number code that already reaches about 30 dB in this world, is exactly linear in the pixels (so it is
smooth in the position of the shape), and needs no training. So the latent space is fixed before anything is trained: the
decoder learns to draw crisp frames from the code, the encoder learns to produce it, and the transformer can train at the
same time as both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .world import STRIPED, random_scene, random_start, render, trajectory

CHANNELS, TIME, CELL = 16, 4, 8
DETAIL_POWER = 0.5
"""Components keep this power of their spread (1: as in the pixels, 0: all alike), so that the details of an edge weigh less
than its place and colour, but not as little as they do in pixels."""


class LinearCode:
    """Block code: `weight` [16, 3, 4, 8, 8] and `mean` [3, 4, 8, 8]; latents have zero mean and unit variance."""

    def __init__(self, weight: torch.Tensor, mean: torch.Tensor):
        self.weight, self.mean = weight, mean
        self.inverse = torch.linalg.pinv(weight.flatten(1)).T.reshape(weight.shape)
        self.per_colour = weight.permute(1, 0, 2, 3, 4).reshape(3 * CHANNELS, -1)
        self.constant = weight.sum((2, 3, 4))  # [16, 3]: the code of a constant colour, up to the mean
        self.offset = torch.einsum("ncijk,cijk->n", weight, mean)

    @classmethod
    def fit(cls, clips: int = 768, seed: int = 1) -> LinearCode:
        generator = torch.Generator().manual_seed(seed)
        scenes = [random_scene(generator, STRIPED) for _ in range(clips)]
        paths = torch.stack([trajectory(scene, random_start(scene, generator), 9) for scene in scenes])
        rows = blocks(render(scenes, paths)[:, :, 1:]).reshape(-1, 3 * TIME * CELL * CELL)
        mean = rows.mean(0)
        _, spread, components = torch.linalg.svd(rows - mean, full_matrices=False)
        spread = spread[:CHANNELS] / len(rows) ** 0.5
        kept = spread**DETAIL_POWER
        # The first component is the brightness of the background: large in pixels, but a single fact.
        kept[0] = kept[1]
        kept *= (CHANNELS / kept.square().sum()).sqrt()
        # A Hadamard rotation spreads the components evenly over the channels: each has the same variance.
        mix = hadamard(CHANNELS)
        weight = mix @ torch.diag(kept / spread) @ components[:CHANNELS]
        shape = (3, TIME, CELL, CELL)
        return cls(weight.view(CHANNELS, *shape), mean.view(shape))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents [B, 16, t, H/8, W/8] of frames [B, 3, 4t-3, H, W], the first of which counts as standing still, or of
        4t frames from the middle of a video."""
        if frames.shape[2] % TIME:
            frames = torch.cat([frames[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), frames], 2)
        cells = blocks(frames) - self.mean
        return torch.einsum("bthwcijk,ncijk->bnthw", cells, self.weight)

    def cover(self, inside: torch.Tensor) -> torch.Tensor:
        """The code [B, 3, 16, t, H/8, W/8], for each colour, of how much of each pixel is covered, [B, T, H, W].

        A frame is background + (colour - background) * coverage, and the code is linear: `paint` makes it latents.
        """
        if inside.shape[1] % TIME:
            inside = torch.cat([inside[:, :1].expand(-1, TIME - 1, -1, -1), inside], 1)
        cells = blocks(inside[:, None]).flatten(4)
        return (cells @ self.per_colour.T).permute(0, 4, 1, 2, 3).unflatten(1, (3, CHANNELS))

    def paint(self, motions: torch.Tensor, fronts: torch.Tensor, backs: torch.Tensor) -> torch.Tensor:
        """Latents [B, 16, t, h, w] of `motions` [B, 3, 16, t, h, w], what `cover` made, in the colours `fronts` [B, t, 3]
        on the rows of cells `backs` [B, t, h, 3], in [-1, 1]."""
        painted = torch.einsum("bcnthw,bthc->bnthw", motions, fronts[:, :, None] - backs)
        return painted + (backs @ self.constant.T - self.offset).permute(0, 3, 1, 2)[..., None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames [B, 3, 4t-3, H, W] of latents: what the linear code alone can show."""
        cells = torch.einsum("bnthw,ncijk->bctihjwk", latents, self.inverse) + self.mean[:, None, :, None, :, None, :]
        return cells.flatten(2, 3).flatten(3, 4).flatten(4, 5)[:, :, TIME - 1 :]

    def save(self, path: Path) -> None:
        save_file({"weight": self.weight.contiguous(), "mean": self.mean.contiguous()}, path)

    @classmethod
    def load(cls, path: Path) -> LinearCode:
        return cls(**load_file(path))


def blocks(frames: torch.Tensor) -> torch.Tensor:
    """[B, 3, 4t, 8h, 8w] cut into [B, t, h, w, 3, 4, 8, 8]."""
    cut = frames.unflatten(4, (-1, CELL)).unflatten(3, (-1, CELL)).unflatten(2, (-1, TIME))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7)


def hadamard(size: int) -> torch.Tensor:
    """Orthonormal Hadamard matrix; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
