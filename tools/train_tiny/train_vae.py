"""Train the VAE: the decoder draws frames from the linear code, the encoder learns to produce that code.

python -m tools.train_tiny.train_vae decoder
python -m tools.train_tiny.train_vae encoder
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import nn

from rolling_kv.atomic import replacing
from rolling_kv.vae.latents import LATENTS_MEAN, LATENTS_STD

from . import wan_vae
from .code import CELL, TIME, LinearCode
from .loop import WORK, autocast, part_parser, train
from .world import SHAPES, SIDE, STRIPED, other_shapes, pick, random_scene, random_start, render, trajectory

CONFIG = dict(z_dim=16, base_dim=64, decoder_base_dim=32, dim_mult=[1, 1, 1, 1], num_res_blocks=0)
STEPS, RATE = {"decoder": 6000, "encoder": 2400}, 3e-4
"""At four times this rate the decoder took 2,500 steps to where it comes in 500 (26 dB)."""
STEPS_ON, RATE_ON = {"decoder": 300, "encoder": 300}, 2e-4
"""From the weights of an exported model."""
SCALE = 3.5
"""Spread of the transformer's latents. At the second of its 4 noise levels there are 15 parts of noise to one of video: with a
spread of 1, as a VAE usually has, the shape could not be found in it, and the first step's choice would be lost."""
CODE = Path("vae") / "linear_code.safetensors"
"""Where the code lies in an exported model."""
CROPS = ((32, 9, 4), (32, 9, 4), (32, 21, 2), (64, 9, 1), (64, 13, 1))
"""(side, frames, clips) of the batches, one drawn per step, all with about as many pixels. Crops around the shape learn
faster, whole frames teach the walls, and long clips what the causal convolutions see in the middle of a video."""
CUT = 0.3
SHAPE_WEIGHT = 0.3
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


def take_over(vae: AutoencoderKLWan, folder: Path) -> None:
    """Go on from the weights of an exported model, whose 1x1x1 convolutions make and take raw latents."""
    vae.load_state_dict(load_file(folder / "vae/diffusion_pytorch_model.safetensors"))
    mean, std = torch.tensor(LATENTS_MEAN), SCALE * torch.tensor(LATENTS_STD)
    with torch.no_grad():
        out, back = vae.quant_conv, vae.post_quant_conv
        out.weight[:16] /= std.view(-1, 1, 1, 1, 1)
        out.bias[:16] = (out.bias[:16] - mean) / std
        back.bias += back.weight.flatten(1) @ mean
        back.weight *= std.view(1, -1, 1, 1, 1)


def kernels(part: nn.Module) -> list[nn.Parameter]:
    """The weights of the convolutions; the gains of the norms have as many dimensions, all but one of them empty."""
    return [parameter for parameter in part.parameters() if parameter.ndim > 3 and parameter.shape[1] > 1]


def random_clips(generator: torch.Generator, side: int, frames: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [count, 3, frames, side, side] from any time of a video; a crop is aligned to cells, around the shape. A share
    CUT of them looks otherwise from some latent frame on.

    Also [2, count, 3, frames, side, side]: the same clips with the other two shapes in the place of theirs.
    """
    scenes = [random_scene(generator, STRIPED) for _ in range(count)]
    then = [
        replace(scene, shape=look.shape, colour=look.colour, background=look.background)
        for scene, look in ((scene, random_scene(generator)) for scene in scenes)
    ]
    paths = []
    for scene in scenes:
        begin = int(torch.randint(48, (), generator=generator))
        paths.append(trajectory(scene, random_start(scene, generator), begin + frames)[begin:])
    paths = torch.stack(paths)
    cuts = TIME * torch.randint((frames - 1) // TIME, (count,), generator=generator) + 1
    cuts = torch.where(torch.rand(count, generator=generator) < CUT, cuts, frames)
    late = (torch.arange(frames) >= cuts[:, None])[:, None, :, None, None]
    clips = []
    for turn in range(len(SHAPES)):
        shapes = [[(scene.shape, *other_shapes(scene.shape))[turn] for scene in row] for row in (scenes, then)]
        before, after = (
            render([replace(scene, shape=shape) for scene, shape in zip(row, names)], paths)
            for row, names in zip((scenes, then), shapes)
        )
        clips.append(torch.where(late, after, before))
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


def train_decoder(code: LinearCode, steps: int, folder: Path | None = None) -> nn.Module:
    """folder: of an exported model whose weights are the beginning."""
    vae = make_vae()
    if folder is not None:
        take_over(vae, folder)
    unseen, _ = random_clips(torch.Generator().manual_seed(999), SIDE, 21, 8)

    def loss(step, generator, _):
        frames, others = random_clips(generator, *pick(CROPS, generator))
        latents = code.encode(frames)
        spread = NOISE * torch.rand(len(latents), 1, 1, 1, 1, generator=generator).square()
        latents = latents + spread * torch.randn(latents.shape, generator=generator)
        with autocast():
            drawn = wan_vae.decode(vae, latents.to(memory_format=torch.channels_last_3d))
        return frame_loss(drawn.float(), frames, others)

    def evaluate(module):
        decoder = make_vae()
        decoder.load_state_dict(vae.state_dict() | module.state_dict())
        with torch.no_grad(), autocast():
            return f"psnr {psnr(wan_vae.decode(decoder, code.encode(unseen)).float(), unseen):.2f} dB"

    part = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    rate = RATE_ON if folder else RATE
    return train("decoder", part, loss, steps, rate, matrices=kernels(part), evaluate=evaluate)


def train_encoder(code: LinearCode, steps: int, folder: Path | None = None) -> nn.Module:
    """folder: of an exported model whose weights are the beginning."""
    vae = make_vae()
    if folder is not None:
        take_over(vae, folder)
    unseen, _ = random_clips(torch.Generator().manual_seed(999), SIDE, 21, 8)

    def loss(step, generator, _):
        side, length, count = pick(CROPS, generator)
        frames, _ = random_clips(generator, side, length, max(1, count // 2))
        with autocast():
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
    rate = RATE_ON if folder else RATE
    return train("encoder", part, loss, steps, rate, matrices=kernels(part), evaluate=evaluate)


def linear_code(folder: Path | None = None) -> LinearCode:
    """The code all parts share: fitted once, or that of an exported model."""
    path = WORK / "code.safetensors"
    if not path.exists():
        WORK.mkdir(exist_ok=True)
        with replacing(path) as file:
            (LinearCode.fit() if folder is None else LinearCode.load(folder / CODE)).save(file)
    return LinearCode.load(path)


def main() -> None:
    parser = part_parser(__doc__, f"{STEPS}, going on from a model {STEPS_ON}")
    parser.add_argument("part", choices=("decoder", "encoder"))
    parser.add_argument("--from", dest="folder", type=Path, help="an exported model whose weights are the beginning")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = {"decoder": train_decoder, "encoder": train_encoder}
    usual = STEPS_ON if arguments.folder else STEPS
    runs[arguments.part](linear_code(arguments.folder), arguments.steps or usual[arguments.part], arguments.folder)


if __name__ == "__main__":
    main()
