"""The noise that every method takes alike. Needs torch alone: another program's Python may import it."""

from __future__ import annotations

import torch


def draw_noise(seed: int, chunk: int, draw: int, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """Draw 0 is the initial noise of a chunk, draw n the fresh noise after its step n - 1. Float32.

    The seeds are those that ComfyUI's `sample_ar_video` re-noises with, so that its videos can be compared.
    """
    steps_seed = seed + 1000 * chunk + draw - 1
    generator = torch.Generator(device).manual_seed(steps_seed if draw else 2**32 + seed + chunk)
    return torch.randn(shape, generator=generator, device=device)
