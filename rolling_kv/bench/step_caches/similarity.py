"""How alike two videos are, by whatever measures this machine has. Nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

FRAMES_AT_ONCE = 16
"""SSIM and LPIPS hold several copies of the frames that they are given."""


class Similarity:
    """Compares two videos, frames [3, T, H, W] in [-1, 1] on the CPU: calling it gives a number for each of `names`.

    names: "psnr", in dB over the whole video, infinite for equal ones; "ssim", the mean over the frames, with
    torchmetrics; "lpips", likewise, where torchmetrics, torchvision and the weights that they would download are here
    already. notes: what is left out, and why.
    """

    def __init__(self):
        self.names, self.notes = ["psnr"], []
        self._by_frame: dict[str, Callable] = {}
        if find_spec("torchmetrics") is None:
            self.notes.append("No SSIM and no LPIPS: they need torchmetrics (pip install torchmetrics).")
            return
        from torchmetrics.functional.image import structural_similarity_index_measure

        self._by_frame["ssim"] = lambda ours, theirs: structural_similarity_index_measure(ours, theirs, data_range=1.0)
        if find_spec("torchvision") is None:
            self.notes.append("No LPIPS: it needs torchvision.")
        elif not (weights := _lpips_weights()).is_file():
            self.notes.append(f"No LPIPS: its weights are not here, and nothing is downloaded ({weights}).")
        else:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._by_frame["lpips"] = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
        self.names += self._by_frame

    def __call__(self, frames: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
        ours, theirs = ((video.transpose(0, 1).float() + 1) / 2 for video in (frames, original))  # [T, 3, H, W]
        values = {"psnr": _psnr(ours, theirs)}
        for name, measure in self._by_frame.items():
            pieces = list(zip(ours.split(FRAMES_AT_ONCE), theirs.split(FRAMES_AT_ONCE)))
            values[name] = sum(len(piece) * measure(piece, other).item() for piece, other in pieces) / len(ours)
        return values


def _psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """In dB, of values in [0, 1]."""
    error = (ours - theirs).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def _lpips_weights() -> Path:
    """Where torchvision looks for the weights of LPIPS's network before it downloads them."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
