"""Train the transformer and the text encoder on the linear code: first chunks, then clips, then the model's own videos.

python -m tools.train_tiny.train_transformer --compile
"""

from __future__ import annotations

import argparse
import math

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.geometry import TEXT_LENGTH
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.schedule import flow_schedule, warp_steps

from . import teacher
from .detector import detect
from .loop import WORK, save, train
from .pool import CHUNK, LATENT_FRAMES, Pool
from .prompts import TEXT_CONFIG, TextSide, make_tokenizer
from .self_forcing import Rollout, Track, pixel_times, roll_out
from .starts import chosen_start, first_chunks
from .teacher import Prompts, predict
from .train_vae import linear_code
from .world import random_scene, render

CONFIG = dict(
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=16,
    out_channels=16,
    text_dim=TEXT_CONFIG["d_model"],
    freq_dim=128,
    ffn_dim=384,
    num_layers=5,
)
STEPS, CLIPS, RATE = 8000, 6000, 1.2e-3
CLIPS_FROM, SELF_FROM = 1500, 5500
"""Steps from which whole clips join the first chunks, and from which the model's own videos join both."""
SPREAD_FROM, SPREAD_BY = 400, 2500
"""Steps between which the starts chosen by the noise spread from the middle to everywhere."""
FIRST_CHUNKS, BATCH = 32, 6
"""First chunks and whole clips in a batch. Nothing comes before a first chunk, so it is cheap; and it has to follow from
the prompt alone, so it is the hardest part. Before the clips join, a batch has half as many again."""
ROLLOUT_VIDEOS, ROLLOUT_CHUNKS, ROLLOUT_EVERY = 16, 10, 20
SHIFT = 5.0
SAMPLING_STEPS = (1000, 750, 500, 250)
FEW_STEP_SHARE = 0.7
"""Share of the noise levels that are exactly those of 4-step sampling; the rest is spread over the schedule."""
FIRST_CHUNK_SHARES = (0.4, 0.25, 0.2, 0.15)
"""Of the 4 levels, in first chunks: what is hardest, most often."""
SCALE = 3.0
"""Spread of the latents. At the second of the 4 levels there are 15 parts of noise to one of video: with a spread of 1, as a
VAE usually has, the shape could not be found in it, and the first step's choice would be lost."""
CONTEXT_NOISE = 0.3
"""Largest spread of the noise on the clean context: what the model made itself is never as clean as the data."""
WINDOW = 3
"""Chunks that a chunk attends to, itself included."""
PADDING_STEPS = 400
UNNAMED = 0.06
"""Share of the clips without a prompt, for guidance."""
PRESET = ModelPreset(
    "tiny", SamplingConfig(chunk=CHUNK, denoising_steps=SAMPLING_STEPS, shift=SHIFT), CacheConfig(window=WINDOW * CHUNK)
)


class Denoiser(nn.Module):
    """What is trained together: the transformer and the text encoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(**CONFIG)
        self.text = TextSide(tokenizer_file())

    def prompts(self, pairs: list[tuple[str, str]], second: torch.Tensor, padding: float = 1.0) -> Prompts:
        embeddings, lengths = self.text([prompt for pair in pairs for prompt in pair])
        return Prompts(embeddings.unflatten(0, (-1, 2)), lengths.view(-1, 2), second, padding)


def tokenizer_file():
    path = WORK / "spiece.model"
    if not path.exists():
        make_tokenizer(path)
    return path


def motion_pool(clips: int) -> Pool:
    path = WORK / f"pool_{clips}.pt"
    code = linear_code()
    if not path.exists():
        save(Pool.make(code, clips).state(), path)
    return Pool.from_state(torch.load(path, weights_only=True), code)


def few_step_sigmas() -> torch.Tensor:
    return torch.tensor([float(step.sigma) for step in warp_steps(SAMPLING_STEPS, SHIFT)])


def random_sigmas(shape: tuple[int, ...], generator: torch.Generator, shares=(1.0, 1.0, 1.0, 1.0)) -> torch.Tensor:
    count = math.prod(shape)
    few = few_step_sigmas()[torch.multinomial(torch.tensor(shares), count, True, generator=generator)].view(shape)
    spread = flow_schedule(SHIFT)[1].float()
    spread = spread[torch.randint(len(spread), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < FEW_STEP_SHARE, few, spread)


class Losses:
    """The parts of the loss; each draws its own examples. `model` is being trained, `averaged` rolls out videos."""

    def __init__(self, model: Denoiser, pool: Pool):
        self.model, self.pool, self.code = model, pool, pool.code
        self.rollout: Rollout | None = None

    def __call__(self, step: int, generator: torch.Generator, averaged: Denoiser) -> torch.Tensor:
        padding = min(1.0, step / PADDING_STEPS)
        own = step >= SELF_FROM
        if step < CLIPS_FROM:
            return self.first_chunks(step, generator, FIRST_CHUNKS * 3 // 2, padding)
        total = self.first_chunks(step, generator, FIRST_CHUNKS // 2 if own else FIRST_CHUNKS, padding)
        if own:
            total = total + self.own_first_chunks(generator, averaged, FIRST_CHUNKS // 2)
            if self.rollout is None or step % ROLLOUT_EVERY == 0:
                self.rollout = self.new_rollout(step, generator, averaged)
        total = total + self.clips(generator, BATCH // 2 if own else BATCH)
        return total + self.own_clips(generator, BATCH // 2) if own else total

    def first_chunks(self, step: int, generator: torch.Generator, count: int, padding: float) -> torch.Tensor:
        """First chunks of the data. At the highest level the noise says where they start."""
        scenes = [random_scene(generator) for _ in range(count)]
        sigmas = random_sigmas((count, 1), generator, FIRST_CHUNK_SHARES)
        noise = torch.randn(count, 16, CHUNK, 8, 8, generator=generator)
        spread = min(1.0, max(0.0, (step - SPREAD_FROM) / (SPREAD_BY - SPREAD_FROM)))
        anywhere = torch.rand(count, 2, generator=generator)
        start = torch.where(sigmas == 1, chosen_start(noise, spread), anywhere)
        clean = SCALE * first_chunks(self.code, scenes, start)
        noisy = torch.lerp(clean, noise, sigmas[..., None, None, None])
        unnamed = torch.rand(count, generator=generator) < UNNAMED
        names = [("", "") if empty else (scene.prompt,) * 2 for scene, empty in zip(scenes, unnamed.tolist())]
        prompts = self.model.prompts(names, torch.zeros(count, 1, dtype=torch.bool), padding)
        return self.errors(None, noisy, clean, sigmas, prompts).mean()

    def own_first_chunks(self, generator: torch.Generator, averaged: Denoiser, count: int) -> torch.Tensor:
        """First chunks at the lower levels, where what was mixed with the noise is the model's own last prediction."""
        scenes = [random_scene(generator) for _ in range(count)]
        pairs, second = [(scene.prompt,) * 2 for scene in scenes], torch.zeros(count, 1, dtype=torch.bool)
        level = int(torch.randint(1, len(SAMPLING_STEPS), (), generator=generator))
        few = few_step_sigmas()
        with torch.no_grad():
            prompts = averaged.prompts(pairs, second)
            noisy = torch.randn(count, 16, CHUNK, 8, 8, generator=generator)
            for sigma, following in zip(few[:level], few[1:]):
                with torch.autocast("cpu", torch.bfloat16):
                    flow = predict(averaged.transformer, None, noisy, sigma.expand(count, 1) * 1000, prompts, 1, CHUNK)
                guess = noisy - sigma * flow.float()
                noisy = torch.lerp(guess, torch.randn(noisy.shape, generator=generator), following)
            track, times = Track(scenes), pixel_times(0)
            usable = track.fit([detect(video) for video in self.code.decode(guess / SCALE)], times, bounces=False)
            clean = SCALE * self.code.encode(render(scenes, track.at(times)))
        sigmas = few[level].expand(count, 1)
        errors = self.errors(None, noisy, clean, sigmas, self.model.prompts(pairs, second))
        return (errors[:, 0] * usable).sum() / count

    def clips(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """Teacher forcing on clips of the data, with a little noise on the past."""
        batch = self.pool.draw(count, generator)
        clean = SCALE * batch.latents
        sigmas = random_sigmas(batch.second.shape, generator)
        spread = CONTEXT_NOISE * torch.rand(count, 1, 1, 1, 1, generator=generator)
        context = clean + spread * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, per_frame(sigmas))
        errors = self.errors(context, noisy, clean, sigmas, self.model.prompts(batch.prompts, batch.second))
        return errors[:, 1:].mean()

    def own_clips(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """Teacher forcing whose past is a piece of the model's own videos."""
        rollout, chunks = self.rollout, LATENT_FRAMES // CHUNK
        rows = torch.randint(len(rollout.scenes), (count,), generator=generator).tolist()
        begins = torch.randint(ROLLOUT_CHUNKS - chunks + 1, (count,), generator=generator).tolist()
        frames = [slice(begin * CHUNK, begin * CHUNK + LATENT_FRAMES) for begin in begins]
        context = torch.stack([rollout.own[row, :, part] for row, part in zip(rows, frames)])
        clean = torch.stack([rollout.right[row, :, part] for row, part in zip(rows, frames)])
        usable = torch.stack([rollout.usable[row, begin : begin + chunks] for row, begin in zip(rows, begins)])
        sigmas = random_sigmas((count, chunks), generator)
        noisy = torch.lerp(clean, torch.randn(clean.shape, generator=generator), per_frame(sigmas))
        pairs = [(rollout.scenes[row].prompt,) * 2 for row in rows]
        prompts = self.model.prompts(pairs, torch.zeros(count, chunks, dtype=torch.bool))
        errors = self.errors(context, noisy, clean, sigmas, prompts)
        # The first chunk of a piece lacks the past that it had in the video.
        return (errors * usable)[:, 1:].mean()

    def new_rollout(self, step: int, generator: torch.Generator, averaged: Denoiser) -> Rollout:
        scenes = [random_scene(generator) for _ in range(ROLLOUT_VIDEOS)]
        with torch.no_grad():
            words, _ = averaged.text([scene.prompt for scene in scenes])
        prompt = nn.functional.pad(words, (0, 0, 0, TEXT_LENGTH - words.shape[1]))
        model = CausalModel(averaged.transformer, PRESET)
        return roll_out(model, prompt, scenes, self.code, SCALE, ROLLOUT_CHUNKS, seed=step)

    def errors(self, context, noisy, clean, sigmas, prompts) -> torch.Tensor:
        """Mean squared error of the flow [B, chunks]."""
        with torch.autocast("cpu", torch.bfloat16):
            window = WINDOW if context is not None else 1
            flow = predict(self.model.transformer, context, noisy, sigmas * 1000, prompts, window, CHUNK)
        target = (noisy - clean) / per_frame(sigmas)
        return (flow.float() - target).square().unflatten(2, (-1, CHUNK)).mean((1, 3, 4, 5))


def per_frame(sigmas: torch.Tensor) -> torch.Tensor:
    return sigmas.repeat_interleave(CHUNK, 1)[:, None, :, None, None]


def train_transformer(steps: int = STEPS, clips: int = CLIPS, rate: float = RATE) -> nn.Module:
    model = Denoiser()
    matrices = [parameter for parameter in model.transformer.blocks.parameters() if parameter.ndim == 2]
    return train("transformer", model, Losses(model, motion_pool(clips)), steps, rate, matrices=matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="with a C++ compiler: a quarter less time per step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        teacher.compile_blocks()
    train_transformer(arguments.steps, arguments.clips, arguments.rate)


if __name__ == "__main__":
    main()
