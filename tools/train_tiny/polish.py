"""Last, the decoder meets what it will be given: latents that the finished transformer made.

They are not quite on the code, and their errors are no noise: a decoder that has never seen them draws a circle with lumps,
from frame to frame others. So it is shown the model's own videos, with the frames that they should show: the prompt's shape,
where the decoder itself shows it. And its causal convolutions reach more than forty frames back: in short clips they always see the
zeros before the first frame, in a long video they no longer do, and a decoder that has seen short clips alone draws specks
there, on grey most of all. So it is shown long ones, too.

    python -m tools.train_tiny.polish
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.nn.functional import pad

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.geometry import TEXT_LENGTH
from rolling_kv.sampling.session import RollingSession

from . import wan_vae
from .code import CELL, TIME
from .detector import Sighting, detect
from .loop import WORK, autocast, part_parser, train
from .train_transformer import PRESET, Denoiser
from .train_vae import CROPS, NOISE, SCALE, frame_loss, kernels, linear_code, make_vae, random_clips
from .world import SIDE, Scene, centre_of_mass, other_shapes, pick, random_scene, render

STEPS, RATE = 300, 1e-4
VIDEOS, CHUNKS = 64, 8
LONG_CROPS, LONG = (32, 93, 1), 0.3
"""Clips of the world that are long, and their share."""
PIECES, PIECE, UNSEEN = 3, 7, 2
"""Own pieces in a batch, latent frames of each, and how many of these count for nothing: to a decoder that begins there, the
first is one frame and not four."""


class OwnVideos(NamedTuple):
    """Videos that the transformer makes. latents [N, 16, F, 8, 8]: their codes. paths [N, T, 2]: where the shapes are seen."""

    latents: torch.Tensor
    scenes: list[Scene]
    paths: torch.Tensor

    @classmethod
    def make(cls, vae: AutoencoderKLWan, count: int = VIDEOS, chunks: int = CHUNKS, seed: int = 11) -> OwnVideos:
        """Of the averaged transformer, seen as `vae` shows them. Those that lost their shape are left out."""
        model = Denoiser().eval().requires_grad_(False)
        model.load_state_dict(torch.load(WORK / "transformer.pt", weights_only=True)["averaged"])
        generator = torch.Generator().manual_seed(seed)
        scenes = [random_scene(generator) for _ in range(count)]
        words, _ = model.text([scene.prompt for scene in scenes])
        prompt = pad(words, (0, 0, 0, TEXT_LENGTH - words.shape[1]))
        causal = CausalModel(model.transformer, PRESET)
        with RollingSession(causal, prompt, height=SIDE, width=SIDE, batch=count) as session:
            latents = torch.cat([chunk.latents for chunk in session.generate(chunks, seed=seed)], 2) / SCALE
        with torch.no_grad(), autocast():
            frames = torch.cat([wan_vae.decode(vae, video).float() for video in latents.split(1)])
        seen = [detect(video) for video in frames]
        kept = [index for index, (scene, sighting) in enumerate(zip(scenes, seen)) if shows(sighting, scene)]
        bias = torch.tensor([centre_of_mass(scenes[index]) for index in kept])
        paths = smooth(torch.stack([seen[index].position for index in kept])) - bias[:, None]
        return cls(latents[kept], [scenes[index] for index in kept], paths)

    def piece(
        self, generator: torch.Generator, side: int = SIDE // 2
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [1, 16, PIECE, s, s] around the shape, the frames [1, 3, 4 PIECE, side, side] that they should show, and the
        same frames with the two other shapes [2, 1, 3, 4 PIECE, side, side]."""
        row, begin = (
            int(torch.randint(count, (), generator=generator))
            for count in (len(self.scenes), self.latents.shape[2] - PIECE)
        )
        scene, first = self.scenes[row], TIME * begin + 1
        path = self.paths[row : row + 1, first : first + TIME * PIECE]
        shapes = (scene.shape, *other_shapes(scene.shape))
        frames = torch.stack([render([replace(scene, shape=shape)], path) for shape in shapes])
        middle = path[0, path.shape[1] // 2] + 6 * torch.randn(2, generator=generator)
        x, y = ((middle - side / 2) / CELL).round().clamp(0, (SIDE - side) // CELL).long().tolist()
        cells = side // CELL
        codes = self.latents[row : row + 1, :, begin + 1 : begin + 1 + PIECE, y : y + cells, x : x + cells]
        frames = frames[..., CELL * y : CELL * y + side, CELL * x : CELL * x + side]
        return codes, frames[0], frames[1:]


def shows(seen: Sighting, scene: Scene) -> bool:
    """Whether the shape of `scene` is there, in its colour, nearly all the time."""
    right = [pair == (scene.shape, scene.colour) for pair in zip(seen.shape, seen.colour)]
    return bool(seen.present.all()) and sum(right) > 0.9 * len(right)


def smooth(positions: torch.Tensor) -> torch.Tensor:
    """Positions [N, T, 2], each a little like those before and after."""
    around = torch.cat([positions[:, :1], positions, positions[:, -1:]], 1)
    return (around[:, :-2] + 2 * positions + around[:, 2:]) / 4


def polish(steps: int = STEPS, rate: float = RATE) -> nn.Module:
    vae, code = make_vae(), linear_code()
    vae.load_state_dict(vae.state_dict() | torch.load(WORK / "decoder.pt", weights_only=True)["averaged"])
    own = OwnVideos.make(vae)

    def draw(codes):
        with autocast():
            return wan_vae.decode(vae, codes.to(memory_format=torch.channels_last_3d)).float()

    def loss(step, generator, _):
        codes, shown, others = zip(*(own.piece(generator) for _ in range(PIECES)))
        later = slice(TIME * UNSEEN, None)
        drawn = draw(torch.cat(codes))[:, :, TIME * UNSEEN - TIME + 1 :]
        value = frame_loss(drawn, torch.cat(shown)[:, :, later], torch.cat(others, 1)[:, :, :, later])
        long = float(torch.rand((), generator=generator)) < LONG
        frames, wrong = random_clips(generator, *(LONG_CROPS if long else pick(CROPS, generator)))
        codes = code.encode(frames)
        spread = NOISE * torch.rand(len(codes), 1, 1, 1, 1, generator=generator)
        return value + frame_loss(draw(codes + spread * torch.randn(codes.shape, generator=generator)), frames, wrong)

    part = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    return train("polished", part, loss, steps, rate, average=0.99, matrices=kernels(part))


def main() -> None:
    arguments = part_parser(__doc__, STEPS).parse_args()
    torch.set_num_threads(arguments.threads)
    polish(arguments.steps or STEPS)


if __name__ == "__main__":
    main()
