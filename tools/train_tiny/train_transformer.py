"""Train the transformer and the text encoder on the linear code: first chunks, then clips, then the model's own videos.

torchrun --nproc-per-node 2 -m tools.train_tiny.train_transformer --compile
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.geometry import TEXT_LENGTH
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.schedule import flow_schedule, warp_steps

from . import teacher
from .code import LinearCode
from .detector import detect
from .loop import WORK, autocast, part_parser, save, train
from .pool import CHUNK, CHUNKS, LATENT_FRAMES, Pool
from .prompts import EVERYTHING, TEXT_CONFIG, TextSide, describe, make_tokenizer
from .self_forcing import SHRUNKEN, Rollout, follow, pixel_times, random_story, roll_out, sighted
from .starts import OPEN, chosen_start, drawn, drawn_place, first_paths, settled
from .teacher import Prompts, predict
from .train_vae import SCALE, linear_code
from .world import LOOKS, SIDE, Scene, Track, chance, latent_places, look_numbers, random_scene

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
CLIPS = 4000


class Plan(NamedTuple):
    """own_from, clips_from, self_from: steps from which the model's own first chunks join those of the data, and whole
    clips join both, and own videos these. spread: between these steps the starts chosen by the noise spread from the
    middle to everywhere. padding: steps in which the weight of the prompts' padding grows. told, lots: weights of what
    tokens are told, of what is seen and of what pure noise has decided. firsts, clips, own: first chunks and whole clips in a
    batch, and how many of these are of own videos, in the end. Nothing comes before a first chunk, so it is cheap; and it has to
    follow from the prompt alone, so it is the hardest part. Before the clips join, a batch has a third more.
    rollout_every: steps after which there are `videos` new own videos of so many chunks. smaller, moved: weights of errors that lead to
    a smaller shape, and to another speed or place. shares, few_step_share: see `random_sigmas`, for clips."""

    steps: int
    rate: float
    own_from: int
    clips_from: int
    self_from: int
    spread: tuple[int, int]
    padding: int
    told: float
    lots: float
    firsts: int = 12
    clips: int = 2
    own: int = 1
    rollout_every: int = 50
    videos: int = 16
    chunks: int = 10
    smaller: float = 0.0
    moved: float = 1.0
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    few_step_share: float = 0.7


FIRST_CHUNK_SHARES = (0.45, 0.25, 0.18, 0.12)
"""Of the 4 levels, in first chunks: what is hardest, most often."""
FIRST_CHUNK_FEW_STEP_SHARE = 0.85
FRESH = Plan(4500, 8e-4, 450, 900, 2000, (100, 400), 400, 1.0, 1.0)
GOING_ON = Plan(1400, 3e-4, 0, 0, 100, (-2, -1), 0, 0.0, 1.0)
"""From weights that know most of this world: of what a LoRA learns from, and of the rounds below."""
ROLLING = GOING_ON._replace(firsts=6, clips=4, own=3, rollout_every=40, videos=10, chunks=20)
"""From weights that make good first chunks: what comes later, in the model's own videos."""
FULL_SIZE = ROLLING._replace(smaller=2.0)
"""From weights that go on well, but whose shapes shrink where their colour is close to the background's."""
FULL_SPEED = FULL_SIZE._replace(moved=4.0, shares=FIRST_CHUNK_SHARES, few_step_share=FIRST_CHUNK_FEW_STEP_SHARE)
"""From weights that draw well, but whose first step, from pure noise, draws where a shape has moved to as a blur: what the steps after it
make of that is slow."""
FROM_NOTHING = (FRESH, ROLLING, ROLLING, FULL_SIZE, FULL_SPEED)
"""Rounds. Each begins with the averaged weights of the one before, with its whole rate, and with lessons of its own."""
LONG_PROMPTS = 0.1
"""Share of the batches of first chunks with prompts of many unknown words."""
OTHER_SHAPES = 2.0
"""Weight of errors that lead to the other two shapes. A wrong shape is a few pixels at the edge, which a mean over all hardly
feels: alone it taught the colour in 300 steps and the shape not in 1,800. Nor does it feel half a pixel, by which a shape that
should stand still wanders off: see `Plan.moved`."""
SHIFT = 5.0
SAMPLING_STEPS = (1000, 750, 500, 250)
CONTEXT_NOISE = 0.3
"""Largest spread of the noise on the clean context: what the model made itself is never as clean as the data."""
WINDOW = 3
"""Chunks that a chunk attends to, itself included."""
EMBEDDED = 3.0
"""Size of the embedded patches at first."""
NEAR = {"standing": "moving", "still": "slowly", "black": "grey", "navy": "grey"}
"""Near which word a word starts that the exported model did not know; unknown words start as "a", which says nothing."""
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
        # What is predicted contains the noise, so it has to get through: from the first to the last layer, at a size that the
        # blocks in between do not drown.
        first, last = self.transformer.patch_embedding.weight, self.transformer.proj_out.weight
        with torch.no_grad():
            columns = torch.linalg.qr(torch.randn(first.shape[0], first[0].numel()))[0]
            first.copy_(EMBEDDED * columns.view_as(first))
            # The patch is (channel, row, column) at the one end, (row, column, channel) at the other.
            last.copy_(0.5**0.5 * columns.view(-1, 16, 4).transpose(1, 2).flatten(1).T)
        side, width = (
            SIDE // 16,
            self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim,
        )
        # Read from the states after two blocks, and after three; only while training.
        self.where = nn.Linear(width, CHUNK + 2 * side)
        self.what = nn.Linear(width, sum(map(len, LOOKS.values())) + 4)
        self.lots = nn.Linear(width, 2)

    def take_over(self, folder: Path) -> None:
        """Go on from the weights of an exported model; words that it did not know start as those NEAR them."""
        self.transformer.load_state_dict(load_file(folder / "transformer/diffusion_pytorch_model.safetensors"))
        weights = load_file(folder / "text_encoder/model.safetensors")
        known = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer/spiece.model"))
        table, tokenizer = weights["shared.weight"], self.text.tokenizer
        if known.serialized_model_proto() != tokenizer.serialized_model_proto():
            embeddings = self.text.encoder.shared.weight.detach().clone()
            for token in range(len(embeddings)):
                piece = tokenizer.id_to_piece(token)
                word = piece.removeprefix("▁")
                same, near = known.piece_to_id(piece), known.piece_to_id("▁" + NEAR.get(word, "a"))
                if word in NEAR:
                    embeddings[token] = 0.5**0.5 * (embeddings[token] + table[near])
                else:
                    embeddings[token] = table[near if same == known.unk_id() or not word else same]
            weights["shared.weight"] = embeddings
        self.text.encoder.load_state_dict(weights, strict=False)
        # At zero they change nothing before they have learned to read the states.
        for layer in (self.where, self.what, self.lots):
            nn.init.zeros_(layer.weight)

    def prompts(self, rows: list[tuple[str, ...]], second: torch.Tensor, padding: float = 1.0) -> Prompts:
        """rows: for each video its prompt, or two."""
        count = len(rows[0])
        embeddings, lengths = self.text([prompt for row in rows for prompt in row])
        return Prompts(embeddings.unflatten(0, (-1, count)), lengths.view(-1, count), second, padding)


def tokenizer_file():
    path = WORK / "spiece.model"
    if not path.exists():
        make_tokenizer(path)
    return path


def motion_pool(clips: int, folder: Path | None = None) -> Pool:
    path = WORK / f"pool_{clips}.pt"
    code = linear_code(folder)
    if not path.exists():
        save(Pool.make(code, clips).state(), path)
    return Pool.from_state(torch.load(path, weights_only=True), code)


def few_step_sigmas() -> torch.Tensor:
    return torch.tensor([float(step.sigma) for step in warp_steps(SAMPLING_STEPS, SHIFT)])


def random_sigmas(
    shape: tuple[int, ...], generator: torch.Generator, shares: tuple[float, ...], few_step_share: float
) -> torch.Tensor:
    """Noise levels of this shape. few_step_share: of them are exactly those of 4-step sampling, with these shares of the four; the
    rest is spread over the schedule."""
    count = math.prod(shape)
    few = few_step_sigmas()[torch.multinomial(torch.tensor(shares), count, True, generator=generator)].view(shape)
    spread = flow_schedule(SHIFT)[1].float()
    spread = spread[torch.randint(len(spread), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < few_step_share, few, spread)


class Examples(NamedTuple):
    """context, noisy, clean [B, 16, F, 8, 8]: the past, what the model sees, and what it should see in it; context None: a
    first chunk alone. ways [W, B, 16, F, 8, 8]: from `clean` to what else there could be. sigmas, second, usable [B, chunks]:
    noise levels, whether the second prompt holds, and whether the chunk counts. prompts: one or two for each. looks [B, chunks, 4],
    places [B, F, 2]: what `clean` shows, and where."""

    context: torch.Tensor | None
    noisy: torch.Tensor
    clean: torch.Tensor
    ways: torch.Tensor
    sigmas: torch.Tensor
    prompts: list[tuple[str, ...]]
    second: torch.Tensor
    usable: torch.Tensor
    looks: torch.Tensor
    places: torch.Tensor


class Losses:
    """The parts of the loss; each draws its own examples. `model` is being trained, `averaged` rolls out videos.

    striped: examples in that style, for a LoRA, and none of the model's own videos.
    """

    def __init__(self, model: Denoiser, pool: Pool, plan: Plan = FRESH, striped: bool = False):
        self.model, self.pool, self.code, self.plan, self.striped = model, pool, pool.code, plan, striped
        self.rollout: Rollout | None = None

    def __call__(self, step: int, generator: torch.Generator, averaged: Denoiser) -> torch.Tensor:
        plan = self.plan
        if self.striped:
            first = self.loss([self.first_chunks(plan.steps, generator, plan.firsts)])
            return first + self.loss([self.clips(generator, plan.clips)])
        padding = min(1.0, step / plan.padding) if plan.padding else 1.0
        count = plan.firsts * 4 // 3 if step < plan.clips_from else plan.firsts
        own = 0 if step < plan.own_from else count // 4 if step < plan.self_from else count // 2
        first = [self.first_chunks(step, generator, count - own)]
        if own:
            first.append(self.own_first_chunks(generator, averaged, own))
        total = self.loss(first, padding)
        if step < plan.clips_from:
            return total
        if step < plan.self_from:
            return total + self.loss([self.clips(generator, plan.clips)])
        if self.rollout is None or step % plan.rollout_every == 0:
            self.rollout = self.new_rollout(generator, averaged)
        return total + self.loss([self.clips(generator, plan.clips - plan.own), self.own_clips(generator, plan.own)])

    def loss(self, parts: list[Examples], padding: float = 1.0) -> torch.Tensor:
        """Mean squared error of the flow, and how far it leads towards what else there could have been."""
        context, noisy, clean, sigmas, second, usable, looks, places = (
            None if part[0] is None else torch.cat(part)
            for part in zip(
                *((p.context, p.noisy, p.clean, p.sigmas, p.second, p.usable, p.looks, p.places) for p in parts)
            )
        )
        hidden: list[torch.Tensor] = []
        ways = torch.cat([part.ways for part in parts], 1).unflatten(3, (-1, CHUNK))
        prompts = self.model.prompts([prompt for part in parts for prompt in part.prompts], second, padding)
        with autocast():
            window = WINDOW if context is not None else 1
            flow = predict(self.model.transformer, context, noisy, sigmas * 1000, prompts, window, CHUNK, hidden)
        error = (flow.float() - (noisy - clean) / per_frame(sigmas)).unflatten(2, (-1, CHUNK))
        along = (error * ways).sum((2, 4, 5, 6)) / ways.square().sum((2, 4, 5, 6)).clamp_min(1.0)
        plan = self.plan
        weights = torch.tensor([OTHER_SHAPES] * 2 + [plan.smaller] + [plan.moved] * 4)[: len(ways), None, None]
        away = (weights * along.square()).sum(0)
        errors = (
            error.square().mean((1, 3, 4, 5))
            + away
            + (self.plan.told * self.told(hidden, looks, places) if self.plan.told else 0)
            + (self.plan.lots * self.drawn_lots(hidden, noisy, sigmas) if context is None else 0)
        )
        return (errors * usable).sum() / (usable.numel() - (context is not None) * len(usable))

    def told(self, hidden: list[torch.Tensor], looks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """How badly [B, chunks] each token's states tell where it is, and what is seen and where.

        A rotary embedding says how far tokens are apart, and noise has no edges: so at the highest level a token must find
        out how close it is to them. The loss of the picture alone takes a thousand steps to teach that, this one a hundred.
        """
        batch, chunks, tokens, width = hidden[0].shape
        sizes = CHUNK, SIDE // 16, SIDE // 16
        where = self.model.where(nn.functional.layer_norm(hidden[1], (width,))).split(sizes, 3)
        result = torch.zeros(batch, chunks)
        for scores, own in zip(where, torch.meshgrid(*map(torch.arange, sizes), indexing="ij")):
            own = own.flatten().expand(batch, chunks, -1)
            result = result + 2 * nn.functional.cross_entropy(scores.movedim(3, 1), own, reduction="none").mean(2)
        what = self.model.what(nn.functional.layer_norm(hidden[2], (width,)))
        *names, seen = what.split([*map(len, LOOKS.values()), 4], 3)
        for kind, scores in enumerate(names):
            label = looks[:, :, None, kind].expand(-1, -1, tokens)
            result = result + 0.5 * nn.functional.cross_entropy(scores.movedim(3, 1), label, reduction="none").mean(2)
        step = places.diff(dim=1)
        truth = torch.cat([(places - SIDE / 2) / 8, torch.cat([step, step[:, -1:]], 1) / 4], 2)
        truth = truth.unflatten(1, (chunks, CHUNK)).repeat_interleave(tokens // CHUNK, 2)
        return result + 5 * (seen - truth).square().mean((2, 3))

    def drawn_lots(self, hidden: list[torch.Tensor], noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """How badly [B, 1] each token's states tell what pure noise has decided."""
        lots = self.model.lots(nn.functional.layer_norm(hidden[2], hidden[2].shape[3:]))
        return 8 * (lots - drawn_place(noisy)[:, None, None]).square().mean((2, 3)) * (sigmas == 1)

    def first_chunks(self, step: int, generator: torch.Generator, count: int) -> Examples:
        """First chunks of the data. At the highest level the noise says where they start."""
        sigmas = random_sigmas((count, 1), generator, FIRST_CHUNK_SHARES, FIRST_CHUNK_FEW_STEP_SHARE)
        noise = torch.randn(count, 16, CHUNK, 8, 8, generator=generator)
        scenes, names = described(count, generator, room=30 if chance(generator) < LONG_PROMPTS else 6)
        if self.striped:
            scenes = [(replace(scene, striped=True), said) for scene, said in scenes]
        scenes = [settled(scene, said, OPEN) for scene, said in scenes]
        begin, end = self.plan.spread
        spread = min(1.0, max(0.0, (step - begin) / (end - begin)))
        anywhere = torch.rand(count, 2, generator=generator)
        start = torch.where(sigmas == 1, chosen_start(noise, spread), anywhere)
        paths = first_paths(scenes, start)
        clean, ways = (SCALE * x for x in drawn(self.code, scenes, paths, further=False))
        noisy = torch.lerp(clean, noise, sigmas[..., None, None, None])
        return Examples(None, noisy, clean, ways, sigmas, names, *alone(count), *told_by(scenes, paths))

    def own_first_chunks(self, generator: torch.Generator, averaged: Denoiser, count: int) -> Examples:
        """First chunks at the lower levels, where what was mixed with the noise is the model's own last prediction."""
        scenes, names = described(count, generator)
        level = int(torch.randint(1, len(SAMPLING_STEPS), (), generator=generator))
        with torch.no_grad():
            guess, noisy = sampled(averaged, names, generator, level)
            seen = [detect(video, SHRUNKEN) for video in self.code.decode(guess / SCALE)]
            shown = [sighted(scene, said, sighting) for (scene, said), sighting in zip(scenes, seen)]
            track, times = Track(shown), pixel_times(0)
            usable = follow(track, seen, times, bounces=False)
            paths = track.at(times)
            clean, ways = (SCALE * x for x in drawn(self.code, shown, paths, further=False))
        sigmas = few_step_sigmas()[level].expand(count, 1)
        second, _ = alone(count)
        facts = told_by(shown, paths)
        return Examples(None, noisy, clean, ways, sigmas, names, second, usable[:, None].float(), *facts)

    def clips(self, generator: torch.Generator, count: int) -> Examples:
        """Teacher forcing on clips of the data, with a little noise on the past."""
        batch = self.pool.draw(count, generator, self.striped)
        clean = SCALE * batch.latents
        sigmas = random_sigmas(batch.second.shape, generator, self.plan.shares, self.plan.few_step_share)
        spread = CONTEXT_NOISE * torch.rand(count, 1, 1, 1, 1, generator=generator)
        context = clean + spread * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, per_frame(sigmas))
        usable = (torch.arange(CHUNKS) > 0).float().expand(count, -1)
        rest = batch.prompts, batch.second, usable, batch.looks, batch.places
        return Examples(context, noisy, clean, SCALE * batch.ways, sigmas, *rest)

    def own_clips(self, generator: torch.Generator, count: int) -> Examples:
        """Teacher forcing whose past is a piece of the model's own videos."""
        rollout = self.rollout
        rows = torch.randint(len(rollout.prompts), (count,), generator=generator).tolist()
        begins = torch.randint(self.plan.chunks - CHUNKS + 1, (count,), generator=generator).tolist()
        frames = [slice(begin * CHUNK, begin * CHUNK + LATENT_FRAMES) for begin in begins]
        context = torch.stack([rollout.own[row, :, part] for row, part in zip(rows, frames)])
        clean = torch.stack([rollout.right[row, :, part] for row, part in zip(rows, frames)])
        ways = torch.stack([rollout.ways[:, row, :, part] for row, part in zip(rows, frames)], 1)
        usable = torch.stack([rollout.usable[row, begin : begin + CHUNKS] for row, begin in zip(rows, begins)])
        second = torch.stack([rollout.second[begin : begin + CHUNKS] for begin in begins])
        sigmas = random_sigmas((count, CHUNKS), generator, self.plan.shares, self.plan.few_step_share)
        noisy = torch.lerp(clean, torch.randn(clean.shape, generator=generator), per_frame(sigmas))
        # The first chunk of a piece lacks the past that it had in the video.
        usable = usable * (torch.arange(CHUNKS) > 0)
        looks = torch.stack([rollout.looks[row, begin : begin + CHUNKS] for row, begin in zip(rows, begins)])
        places = torch.stack([rollout.places[row, part] for row, part in zip(rows, frames)])
        prompts = [rollout.prompts[row] for row in rows]
        return Examples(context, noisy, clean, ways, sigmas, prompts, second, usable, looks, places)

    def new_rollout(self, generator: torch.Generator, averaged: Denoiser) -> Rollout:
        stories = [random_story(generator) for _ in range(self.plan.videos)]
        with torch.no_grad():
            words = [averaged.text([story.prompts[which] for story in stories])[0] for which in (0, 1)]
        embeds = tuple(nn.functional.pad(word, (0, 0, 0, TEXT_LENGTH - word.shape[1])) for word in words)
        model = CausalModel(averaged.transformer, PRESET)
        seed = int(torch.randint(2**31, (), generator=generator))
        return roll_out(model, embeds, stories, self.code, SCALE, self.plan.chunks, seed)


def alone(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`second` and `usable` of first chunks alone."""
    return torch.zeros(count, 1, dtype=torch.bool), torch.ones(count, 1)


def told_by(scenes: list[Scene], paths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`looks` and `places` of first chunks."""
    return torch.stack([look_numbers(scene) for scene in scenes])[:, None], latent_places(paths)


def described(
    count: int, generator: torch.Generator, room: int = 6
) -> tuple[list[tuple[Scene, frozenset[str]]], list[tuple[str]]]:
    """Scenes, each with what its prompt says of it, and the prompts."""
    scenes = [random_scene(generator) for _ in range(count)]
    prompts = [describe(scene, generator, room=room) for scene in scenes]
    return [(scene, said) for scene, (_, said) in zip(scenes, prompts)], [(prompt,) for prompt, _ in prompts]


def sampled(
    model: Denoiser, names: list[tuple[str]], generator: torch.Generator, level: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model makes of first chunks in the steps before `level`, and the same with the noise of that level."""
    count, few = len(names), few_step_sigmas()
    prompts = model.prompts(names, torch.zeros(count, 1, dtype=torch.bool))
    noisy = torch.randn(count, 16, CHUNK, 8, 8, generator=generator)
    for sigma, following in zip(few[:level], [*few[1:], torch.tensor(0.0)]):
        with autocast():
            flow = predict(model.transformer, None, noisy, sigma.expand(count, 1) * 1000, prompts, 1, CHUNK)
        guess = noisy - sigma * flow.float()
        noisy = torch.lerp(guess, torch.randn(noisy.shape, generator=generator), following)
    return guess, noisy


@torch.no_grad()
def judged(model: Denoiser, code: LinearCode, count: int = 40) -> str:
    """How much of what prompts say is right in first chunks: of plain prompts, and of those with other words."""
    results = []
    for plain in (True, False):
        generator = torch.Generator().manual_seed(99)
        scenes, names = described(count, generator)
        if plain:
            scenes = [(scene, EVERYTHING) for scene, _ in scenes]
            names = [(scene.prompt,) for scene, _ in scenes]
        guess, _ = sampled(model, names, generator, len(SAMPLING_STEPS))
        right = {"shape": [], "colour": [], "direction": []}
        seen = [detect(video) for video in code.decode(guess / SCALE)]
        for (scene, said), sighting in zip(scenes, seen):
            looks = sighted(scene, frozenset(), sighting)
            moved = scene.speed != "still" or not plain
            for name in said & right.keys() if moved else {"shape", "colour"}:
                right[name].append(sighting.present.any() and getattr(looks, name) == getattr(scene, name))
        shares = " ".join(f"{name} {sum(row) / max(1, len(row)):.2f}" for name, row in right.items())
        odd = sum(float(sighting.mismatch.mean()) for sighting in seen) / count
        results.append(f"{'plain' if plain else 'other'}: {shares} mismatch {odd:.3f}")
    return ", ".join(results)


def per_frame(sigmas: torch.Tensor) -> torch.Tensor:
    return sigmas.repeat_interleave(CHUNK, 1)[:, None, :, None, None]


def train_transformer(
    folder: Path | None = None, rounds: tuple[Plan, ...] | None = None, clips: int = CLIPS
) -> nn.Module:
    """folder: of an exported model whose weights are the beginning. rounds: by default FROM_NOTHING, or its last one alone."""
    model, pool = Denoiser(), motion_pool(clips, folder)
    if folder is not None:
        model.take_over(folder)
    rounds = rounds or (FROM_NOTHING if folder is None else FROM_NOTHING[-1:])
    matrices = [parameter for parameter in model.transformer.blocks.parameters() if parameter.ndim == 2]
    for number, plan in enumerate(rounds, 1):
        averaged = train(
            "transformer" if number == len(rounds) else f"transformer_{number}",
            model,
            Losses(model, pool, plan),
            plan.steps,
            plan.rate,
            matrices=matrices,
            evaluate=lambda model: judged(model, pool.code),
            save_every=200,
            together=True,
            lessons=number - 1,
        )
        model.load_state_dict(averaged.state_dict())
    return averaged


def main() -> None:
    fresh = " and ".join(str(plan.steps) for plan in FROM_NOTHING)
    parser = part_parser(__doc__, f"{fresh}, going on from a model {FROM_NOTHING[-1].steps}; given, one round")
    parser.add_argument("--from", dest="folder", type=Path, help="an exported model whose weights are the beginning")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--compile", action="store_true", help="with a C++ compiler: somewhat less time per step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        teacher.compile_blocks()
    plan = FROM_NOTHING[-1] if arguments.folder else FRESH
    rounds = (plan._replace(steps=arguments.steps),) if arguments.steps else None
    train_transformer(arguments.folder, rounds, arguments.clips)


if __name__ == "__main__":
    main()
