"""Fit the linear map from latents to colours that previews use, to what a model makes and its VAE decodes.

    python -m tools.fit_preview models/tiny

Writes vae/latent_rgb.json in the model's folder, and prints how far the pictures are from the decoded ones. To be run again
whenever the VAE has changed. The prompts are scenes of the tiny model's world.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import avg_pool2d, pixel_unshuffle

from rolling_kv.atomic import replacing
from rolling_kv.previews import FITTED, LinearPreview

from .train_tiny.measure import Tiny, scenes_for

DIGITS = 4
SEEN, UNSEEN = 11, 12
"""Seeds of the scenes to fit to, and of those to measure with."""


def made(tiny: Tiny, videos: int, chunks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Model latents [N, C, h, w] of scenes, and their decoded frames [N, 3, H, W]: the mean of each latent frame's."""
    prompts = [scene.prompt for scene in scenes_for(videos, seed)]
    video, latents = tiny.sample([prompts] * chunks, seed)
    count = latents.shape[2]
    groups = video.split([1] + [(video.shape[2] - 1) // (count - 1)] * (count - 1), dim=2)
    frames = torch.stack([group.mean(2) for group in groups], dim=2)
    return latents.movedim(2, 1).flatten(0, 1).float(), frames.movedim(2, 1).flatten(0, 1)


def fit(latents: torch.Tensor, frames: torch.Tensor, pixels: int) -> dict[str, list]:
    """The least squares from each latent cell to pixels x pixels of a frame, as `LinearPreview` takes them."""
    wanted = avg_pool2d(frames, frames.shape[-1] // latents.shape[-1] // pixels)
    columns = pixel_unshuffle(wanted, pixels).movedim(1, -1).flatten(0, -2).double()
    rows = latents.movedim(1, -1).flatten(0, -2).double()
    solved = torch.linalg.lstsq(torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1), columns).solution
    numbers = [[round(number, DIGITS) for number in row] for row in solved.tolist()]
    return {"factors": numbers[:-1], "bias": numbers[-1]}


def error(fitted: dict[str, list], latents: torch.Tensor, frames: torch.Tensor) -> float:
    """Root of the mean squared difference to decoded frames, of 255."""
    preview = LinearPreview(fitted["factors"], fitted["bias"])
    # The first video of a batch is shown; here all are frames of one.
    shown = preview.pictures(lambda first, last: latents.movedim(0, 1)[None], 0, len(latents)).movedim(-1, 1).float()
    pooled = avg_pool2d(frames, frames.shape[-1] // shown.shape[-1])
    return (shown - (pooled + 1) * 127.5).pow(2).mean().sqrt().item()


def write(folder: Path, pixels: int = 8, videos: int = 16, chunks: int = 3) -> None:
    """Fit, measure and write."""
    tiny = Tiny.load(folder)
    fitted = fit(*made(tiny, videos, chunks, SEEN), pixels)
    with replacing(folder / FITTED, what="preview") as file:
        rows = ",\n  ".join(map(json.dumps, fitted["factors"]))
        file.write_text(
            f'{{\n "factors": [\n  {rows}\n ],\n "bias": {json.dumps(fitted["bias"])}\n}}\n', encoding="utf-8"
        )
    print(f"{folder / FITTED}: {error(fitted, *made(tiny, 4, chunks, UNSEEN)):.1f} of 255 from what is decoded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("models/tiny"))
    parser.add_argument("--pixels", type=int, default=8, help="along each side of what a latent cell becomes")
    parser.add_argument("--videos", type=int, default=16)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.pixels, arguments.videos)


if __name__ == "__main__":
    main()
