"""Train the transformer and the text encoder on the linear code, with teacher forcing.

python -m tools.train_tiny.train_transformer --compile
"""

from __future__ import annotations

import argparse

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from rolling_kv.schedule import flow_schedule, warp_steps

from . import teacher
from .loop import WORK, save, train
from .pool import CHUNK, Pool
from .prompts import TEXT_CONFIG, TextSide, make_tokenizer
from .teacher import Prompts, predict
from .train_vae import linear_code

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
STEPS, CLIPS, BATCH, RATE = 10_000, 6000, 8, 1.2e-3
FIRST_CHUNKS = 24
"""First chunks in each batch, beside the clips."""
SHIFT = 5.0
SAMPLING_STEPS = (1000, 750, 500, 250)
FEW_STEP_SHARE = 0.6
"""Share of the noise levels that are exactly those of 4-step sampling; the rest is spread over the schedule."""
CONTEXT_NOISE = 0.1
"""Largest spread of the noise on the clean context: what the model made itself is never as clean as the data."""
WINDOW = 3
"""Chunks that a chunk attends to, itself included."""
PADDING_STEPS = 800


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


def random_sigmas(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    few = torch.stack([step.sigma for step in warp_steps(SAMPLING_STEPS, SHIFT)])
    few = few[torch.randint(len(few), shape, generator=generator)]
    spread = flow_schedule(SHIFT)[1]
    spread = spread[torch.randint(len(spread), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < FEW_STEP_SHARE, few, spread)


def teacher_forcing_loss(model: Denoiser, batch, step: int, generator: torch.Generator) -> torch.Tensor:
    latents = batch.latents
    count, chunks = batch.second.shape
    sigmas = random_sigmas((count, chunks), generator)
    noise = torch.randn(latents.shape, generator=generator)
    spread = CONTEXT_NOISE * torch.rand(count, 1, 1, 1, 1, generator=generator)
    context = latents + spread * torch.randn(latents.shape, generator=generator)
    level = sigmas.repeat_interleave(CHUNK, 1)[:, None, :, None, None]
    noisy = (1 - level) * latents + level * noise
    prompts = model.prompts(batch.prompts, batch.second, padding=min(1.0, step / PADDING_STEPS))
    with torch.autocast("cpu", torch.bfloat16):
        flow = predict(model.transformer, context, noisy, sigmas * 1000, prompts, WINDOW, CHUNK)
    error = (flow.float() - (noise - latents)).square().unflatten(2, (chunks, CHUNK)).mean((1, 3, 4, 5))
    counts = torch.ones(count, chunks)
    counts[~batch.begins, 0] = 0.0
    return (error * counts).sum() / counts.sum()


def first_chunk_loss(model: Denoiser, batch, step: int, generator: torch.Generator) -> torch.Tensor:
    """The same for the first chunks alone. Nothing is before them, so they are cheap, and they are the hardest part."""
    latents = batch.latents[:, :, :CHUNK]
    count = len(latents)
    sigmas = random_sigmas((count, 1), generator)
    noise = torch.randn(latents.shape, generator=generator)
    level = sigmas[..., None, None, None]
    prompts = model.prompts(batch.prompts, torch.zeros(count, 1, dtype=torch.bool), min(1.0, step / PADDING_STEPS))
    with torch.autocast("cpu", torch.bfloat16):
        flow = predict(model.transformer, None, (1 - level) * latents + level * noise, sigmas * 1000, prompts, 1, CHUNK)
    return (flow.float() - (noise - latents)).square().mean()


def train_teacher(steps: int, clips: int, batch: int, rate: float) -> nn.Module:
    pool = motion_pool(clips)
    model = Denoiser()

    def loss(step, generator):
        whole = teacher_forcing_loss(model, pool.draw(batch, generator), step, generator)
        return whole + first_chunk_loss(model, pool.draw(FIRST_CHUNKS, generator, begins=True), step, generator)

    return train("transformer", model, loss, steps, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="with a C++ compiler: a quarter less time per step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        teacher.block_forward = torch.compile(teacher.block_forward)
    train_teacher(arguments.steps, arguments.clips, arguments.batch, arguments.rate)


if __name__ == "__main__":
    main()
