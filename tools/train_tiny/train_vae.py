"""Train the VAE: the decoder draws frames from the linear code, the encoder learns to produce that code.

python -m tools.train_tiny.train_vae decoder
python -m tools.train_tiny.train_vae encoder
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from . import wan_vae
from .code import CELL, LinearCode
from .loop import WORK, train
from .world import SHAPES, SIDE, pick, random_scene, random_start, render, trajectory

CONFIG = dict(z_dim=16, base_dim=64, decoder_base_dim=32, dim_mult=[1, 1, 1, 1], num_res_blocks=0)
STEPS = {"decoder": 4400, "encoder": 1500}
CROPS = ((32, 9, 16), (32, 9, 16), (32, 21, 7), (64, 9, 4), (64, 21, 2))
"""(side, frames, clips) of the batches, one drawn per step, all with about as many pixels. Crops around the shape learn
faster, whole frames teach the walls, and long clips what the causal convolutions see in the middle of a video."""
SHAPE_WEIGHT = 0.05
NOISE = 0.15
"""Largest spread of the noise on the code: samples of a transformer are never quite on the code."""


def make_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    # Convolutions in bfloat16 are several times faster when the channels come last.
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in formats and parameter.shape[1] > 1:
            parameter.data = parameter.data.to(memory_format=formats[parameter.ndim])
    return vae


def random_clips(generator: torch.Generator, side: int, frames: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [count, 3, frames, side, side] from any time of a video; a crop is aligned to cells, around the shape.

    Also [2, count, 3, frames, side, side]: the same clips with the other two shapes in the place of theirs.
    """
    scenes = [random_scene(generator) for _ in range(count)]
    paths = []
    for scene in scenes:
        begin = int(torch.randint(48, (), generator=generator))
        paths.append(trajectory(scene, random_start(scene, generator), begin + frames)[begin:])
    paths = torch.stack(paths)
    names = [[SHAPES[(SHAPES.index(scene.shape) + turn) % 3] for scene in scenes] for turn in range(3)]
    clips = [render([replace(scene, shape=name) for scene, name in zip(scenes, row)], paths) for row in names]
    centre = paths[:, frames // 2] - side / 2 + 10 * torch.randn(count, 2, generator=generator)
    corners = (centre / CELL).round().clamp(0, (SIDE - side) // CELL).long() * CELL
    crop = [[clip[..., y : y + side, x : x + side] for clip, (x, y) in zip(row, corners.tolist())] for row in clips]
    own, *others = (torch.stack(row) for row in crop)
    return own, torch.stack(others)


def frame_loss(drawn: torch.Tensor, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    error = drawn - frames
    return 4 * error.square().mean() + 0.5 * error.abs().mean() + SHAPE_WEIGHT * shape_error(error, frames, others)


def shape_error(error: torch.Tensor, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How far an `error` of `frames` goes towards each of the `others`, squared and averaged; 1 is all the way.

    The corners of a small square are a few pixels, which a mean over all pixels hardly feels; but they are what makes it
    a square.
    """
    way = others - frames
    along = (error * way).sum((2, 4, 5)) / way.square().sum((2, 4, 5)).clamp_min(1.0)
    return along.square().mean()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Over frames in [-1, 1]: the peak-to-peak range is 2."""
    return float(10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().mean()))


def train_decoder(code: LinearCode, steps: int) -> nn.Module:
    vae = make_vae()
    unseen, _ = random_clips(torch.Generator().manual_seed(999), SIDE, 21, 16)

    def loss(step, generator, _):
        frames, others = random_clips(generator, *pick(CROPS, generator))
        latents = code.encode(frames)
        spread = NOISE * torch.rand(len(latents), 1, 1, 1, 1, generator=generator).square()
        latents = latents + spread * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = wan_vae.decode(vae, latents.to(memory_format=torch.channels_last_3d))
        return frame_loss(drawn.float(), frames, others)

    def evaluate(module):
        decoder = make_vae()
        decoder.load_state_dict(vae.state_dict() | module.state_dict())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return f"psnr {psnr(wan_vae.decode(decoder, code.encode(unseen)).float(), unseen):.2f} dB"

    part = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    return train("decoder", part, loss, steps, rate=3e-3, evaluate=evaluate)


def train_encoder(code: LinearCode, steps: int) -> nn.Module:
    vae = make_vae()
    unseen, _ = random_clips(torch.Generator().manual_seed(999), SIDE, 21, 16)

    def loss(step, generator, _):
        side, length, count = pick(CROPS, generator)
        frames, _ = random_clips(generator, side, length, count // 2)
        with torch.autocast("cpu", torch.bfloat16):
            latents = wan_vae.encode(vae, frames.to(memory_format=torch.channels_last_3d))
        return nn.functional.huber_loss(latents.float(), code.encode(frames), delta=1.0)

    def evaluate(module):
        encoder = make_vae()
        encoder.load_state_dict(vae.state_dict() | module.state_dict())
        with torch.no_grad():
            latents = wan_vae.encode(encoder, unseen)
        error = (latents - code.encode(unseen)).square().mean().sqrt()
        return (
            f"error of the code {error:.4f}, psnr through the linear code {psnr(code.decode(latents), unseen):.2f} dB"
        )

    part = nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv})
    return train("encoder", part, loss, steps, rate=2e-3, evaluate=evaluate)


def linear_code() -> LinearCode:
    """The code all parts share; fitted once."""
    path = WORK / "code.pt"
    if not path.exists():
        WORK.mkdir(exist_ok=True)
        LinearCode.fit().save(path)
    return LinearCode.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("decoder", "encoder"))
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = {"decoder": train_decoder, "encoder": train_encoder}
    runs[arguments.part](linear_code(), arguments.steps or STEPS[arguments.part])


if __name__ == "__main__":
    main()
