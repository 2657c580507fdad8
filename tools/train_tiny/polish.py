"""Last, the decoder meets what it will be given: latents that the finished transformer made.

They are not quite on the code, and their errors are no noise. And its causal convolutions reach more than forty frames back:
in short clips they always see the zeros before the first frame, in a long video they no longer do, and a decoder that has
seen short clips alone draws specks there, on grey most of all. So it is shown long videos: the model's own, with the frames
that they should show (the prompt's shape, where the detector sees it), and the world's.

    python -m tools.train_tiny.polish
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import pad

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.geometry import TEXT_LENGTH
from rolling_kv.sampling.session import RollingSession

from . import wan_vae
from .detector import detect
from .loop import WORK, autocast, part_parser, train
from .self_forcing import follow, pixel_times
from .train_transformer import PRESET, Denoiser
from .train_vae import NOISE, SCALE, frame_loss, linear_code, make_vae, random_clips
from .world import SIDE, Track, other_shapes, random_scene, render

STEPS, STEPS_ON, RATE = 140, 30, 8e-4
"""STEPS_ON: where the decoder went on from an exported one, which was polished already."""
VIDEOS, CHUNKS = 64, 8
LONG_CROPS = (32, 93, 2)


def own_videos(count: int, chunks: int, seed: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, 16, F, 8, 8] of videos that the averaged transformer makes, the frames [N, 3, T, 64, 64] that they should
    show, and the same frames with the two other shapes [2, N, 3, T, 64, 64]. Videos that lost their shape are left out."""
    code, model = linear_code(), Denoiser().eval().requires_grad_(False)
    model.load_state_dict(torch.load(WORK / "transformer.pt", weights_only=True)["averaged"])
    generator = torch.Generator().manual_seed(seed)
    scenes = [random_scene(generator) for _ in range(count)]
    words, _ = model.text([scene.prompt for scene in scenes])
    prompt = pad(words, (0, 0, 0, TEXT_LENGTH - words.shape[1]))
    causal = CausalModel(model.transformer, PRESET)
    with RollingSession(causal, prompt, height=SIDE, width=SIDE, batch=count) as session:
        latents = torch.cat([chunk.latents for chunk in session.generate(chunks, seed=seed)], 2) / SCALE
    track, frames, known = Track(scenes), code.decode(latents), torch.ones(count, dtype=torch.bool)
    places = []
    for chunk in range(chunks):
        times = pixel_times(chunk)
        known = known & follow(track, [detect(video[:, times]) for video in frames], times, bounces=chunk > 0)
        places.append(track.at(times))
    kept = known.nonzero()[:, 0].tolist()
    paths = torch.cat(places, 1)[kept]
    shapes = zip(*[(scenes[i].shape, *other_shapes(scenes[i].shape)) for i in kept])
    own, *others = (render([replace(scenes[i], shape=name) for i, name in zip(kept, names)], paths) for names in shapes)
    return latents[kept], own, torch.stack(others)


def polish(steps: int = STEPS, rate: float = RATE) -> nn.Module:
    vae, code = make_vae(), linear_code()
    vae.load_state_dict(vae.state_dict() | torch.load(WORK / "decoder.pt", weights_only=True)["averaged"])
    latents, shown, others = own_videos(VIDEOS, CHUNKS)

    def draw(codes):
        with autocast():
            return wan_vae.decode(vae, codes.to(memory_format=torch.channels_last_3d)).float()

    def loss(step, generator, _):
        rows = torch.randint(len(latents), (1,), generator=generator)
        own = frame_loss(draw(latents[rows]), shown[rows], others[:, rows])
        frames, wrong = random_clips(generator, *LONG_CROPS)
        codes = code.encode(frames)
        codes = codes + NOISE * torch.rand(len(codes), 1, 1, 1, 1, generator=generator) * torch.randn(
            codes.shape, generator=generator
        )
        return own + frame_loss(draw(codes), frames, wrong)

    part = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    return train("polished", part, loss, steps, rate, average=0.98)


def main() -> None:
    arguments = part_parser(__doc__, f"{STEPS}, after a decoder that went on from a model {STEPS_ON} do").parse_args()
    torch.set_num_threads(arguments.threads)
    polish(arguments.steps or STEPS)


if __name__ == "__main__":
    main()
