"""Measure a tiny model as a viewer would: sample through the rolling cache, decode, and read the pixels.

    python -m tools.train_tiny.measure models/tiny --seed 7

Prints tables in Markdown; docs/tiny-model.md has their figures.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from rolling_kv.checkpoints.model import load_model
from rolling_kv.config import CacheConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.lora.reader import load_lora
from rolling_kv.lora.stack import applied_loras
from rolling_kv.sampling.session import RollingSession
from rolling_kv.text import load_text_encoder
from rolling_kv.vae.latents import to_raw
from rolling_kv.vae.loading import load_vae

from .detector import Sighting, detect, direction, prediction_errors
from .prompts import describe
from .train_lora import LORA
from .world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIDE,
    SIZES,
    SPEEDS,
    STRAIGHT_FRAMES,
    STRIPE,
    STRIPE_SHADE,
    Scene,
    pick,
    random_scene,
    random_start,
    render,
    trajectory,
)

BATCH = 20
CLEAN = 0.1
"""Share of the area of a shape that may be otherwise than in an ideal one."""
PACE = 4
"""Frames over which the speed is read: in one, the position is known to a fifth of a pixel."""
OTHER_WORDS = tuple(
    "cat snow photograph of, dramatic 4k très élégant кошка снег 雪山 (masterpiece:1.2) 🙂 -- the".split()
)


class Tiny(NamedTuple):
    model: object
    text: object
    vae: object

    @classmethod
    def load(cls, folder: Path) -> Tiny:
        return cls(load_model(folder), load_text_encoder(folder), load_vae(folder))

    def sample(
        self, prompts: list[list[str]], seed: int, cache: CacheConfig | None = None, **options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Videos [B, 3, T, 64, 64] and latents; prompts[chunk][video], a new entry only where `set_prompt` is called."""
        with torch.inference_mode():
            embeds = {tuple(row): self.text.encode(row) for row in prompts}
        first = embeds[tuple(prompts[0])]
        negative = self.text.encode([""]) if "sampling" in options and options["sampling"].guided else None
        session = RollingSession(
            self.model, first, negative=negative, height=SIDE, width=SIDE, batch=len(prompts[0]), cache=cache, **options
        )
        chunks = []
        with session:
            for index, row in enumerate(prompts):
                if index and row != prompts[index - 1]:
                    session.set_prompt(embeds[tuple(row)], negative)
                chunks += [chunk.latents for chunk in session.generate(1, seed=seed)]
        latents = torch.cat(chunks, 2)
        with torch.inference_mode():
            # One by one, so that what is in between stays in the CPU's caches: 2.5 times as fast as twenty at once.
            videos = [self.vae.decoder().decode(video) for video in to_raw(latents).split(1)]
            return torch.cat(videos), latents


def borders(chunks: int, chunk: int = 3) -> list[int]:
    """Pixel frames at which chunks begin, the first chunk left out."""
    return [WAN_21.pixel_frames(chunk * index) for index in range(1, chunks)]


def scenes_for(count: int, seed: int) -> list[Scene]:
    generator = torch.Generator().manual_seed(seed)
    return [random_scene(generator) for _ in range(count)]


def right(scene: Scene, seen: Sighting) -> torch.Tensor:
    """In which frames [T] there is the right shape in the right colour."""
    names = zip(seen.colour, seen.shape)
    return seen.present & torch.tensor([pair == (scene.colour, scene.shape) for pair in names])


def watch(
    tiny: Tiny, scenes: list[Scene], chunks: int, cache: CacheConfig | None = None, seed: int = 0, **options
) -> list[Sighting]:
    """Sample a video of each scene and detect what it shows."""
    seen = []
    for begin in range(0, len(scenes), BATCH):
        row = [scene.prompt for scene in scenes[begin : begin + BATCH]]
        videos, _ = tiny.sample([row] * chunks, seed + begin, cache, **options)
        seen += [detect(video) for video in videos]
    return seen


def share(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values) if values else float("nan")


def latent_errors(seen: list[Sighting], frames: slice = slice(None)) -> torch.Tensor:
    """Prediction error of the position, in pixels, for latent frames 2, 3, … of each video: [videos, latent frames - 2].

    A chunk border lies between two latent frames, and the decoder spreads what happens there over the pixel frames of the
    later one. So an error is the mean over the four pixel frames of a latent frame, or over those that `frames` selects.
    """
    errors = torch.stack([prediction_errors(sighting.position) for sighting in seen])
    # Prediction errors start with pixel frame 2, latent frame 2 with pixel frame 5.
    return errors[:, 3:].unflatten(1, (-1, WAN_21.temporal))[..., frames].mean(2)


def border_errors(seen: list[Sighting], chunk: int = 3, frames: slice = slice(None)) -> tuple[float, float]:
    """Median over `latent_errors` at chunk borders, and inside chunks."""
    errors = latent_errors(seen, frames)
    border = torch.arange(2, 2 + errors.shape[1]) % chunk == 0
    return float(errors[:, border].median()), float(errors[:, ~border].median())


def measure_prompts(tiny: Tiny, count: int, chunks: int = 5, seed: int = 0, **options) -> dict[str, float]:
    """Colour, shape and direction as the prompt says; smoothness at borders, with the cache and without."""
    scenes = scenes_for(count, 1000 * seed + 1)
    seen = watch(tiny, scenes, chunks, seed=1000 * seed, **options)
    ways = [(scene, direction(s.position[:STRAIGHT_FRAMES])) for scene, s in zip(scenes, seen)]
    still = [s.position for scene, s in zip(scenes, seen) if scene.speed == "still"]
    border, inside = border_errors(seen)
    first = border_errors(seen, frames=slice(0, 1))
    alone, _ = border_errors(watch(tiny, scenes, chunks, CacheConfig(window=3), seed=1000 * seed, **options))
    pairs = list(zip(scenes, seen))
    return {
        "shape is there, frames": share(s.present.float().mean() for s in seen),
        "colour right, frames": share(name == scene.colour for scene, s in pairs for name in s.colour),
        "shape right, frames": share(name == scene.shape for scene, s in pairs for name in s.shape),
        "size right, frames": share((s.size - SIZES[scene.size]).abs().lt(1.75).float().mean() for scene, s in pairs),
        "direction right, videos": share(way == scene.direction for scene, way in ways if scene.speed != "still"),
        "speed from the second chunk on, of the one that is said": share(
            pace(s.position[STRAIGHT_FRAMES:]) / SPEEDS[scene.speed] for scene, s in pairs if scene.speed != "still"
        ),
        "stands still when told to, videos": share(bool((p - p[0]).norm(dim=1).max() < 1.5) for p in still),
        "error at borders, px": border,
        "error inside chunks, px": inside,
        "border / inside": border / inside,
        "the same, first pixel frame of each latent frame only": first[0] / first[1],
        "error at borders without the cache, px": alone,
        "without / with the cache": alone / border,
    }


def pace(position: torch.Tensor) -> float:
    """Pixels per frame along positions [T, 2]; walls are in few of the frames."""
    return float((position[PACE:] - position[:-PACE]).norm(dim=1).median()) / PACE


def measure_words(tiny: Tiny, count: int, chunks: int = 5, seed: int = 0) -> dict[str, float]:
    """Prompts with unknown words, without some of the known ones, in any order: what they say is right, the picture clean."""
    generator = torch.Generator().manual_seed(1000 * seed + 5)
    pairs = [(scene, *describe(scene, generator, room=12)) for scene in scenes_for(count, 1000 * seed + 6)]
    prompts = [
        " ".join(pick(OTHER_WORDS, generator) if w[0] == "?" else w for w in text.split()) for _, text, _ in pairs
    ]
    seen = []
    for begin in range(0, count, BATCH):
        row = [_cased(prompt, generator) for prompt in prompts[begin : begin + BATCH]]
        seen += [detect(video) for video in tiny.sample([row] * chunks, 1000 * seed + begin)[0]]
    said = {
        name: [
            share(value == getattr(scene, name) for value in getattr(s, name))
            for (scene, _, words), s in zip(pairs, seen)
            if name in words
        ]
        for name in ("colour", "shape")
    }
    return {
        "a shape is there, clean, frames": share((s.present & (s.mismatch < CLEAN)).float().mean() for s in seen),
        "the same shape and colour throughout, videos": share(
            len(set(s.shape)) == len(set(s.colour)) == 1 for s in seen
        ),
        "colour right where it is said, frames": share(said["colour"]),
        "shape right where it is said, frames": share(said["shape"]),
        "direction right where it is said, videos": share(
            direction(s.position[:STRAIGHT_FRAMES]) == scene.direction
            for (scene, _, words), s in zip(pairs, seen)
            if "direction" in words
        ),
    }


def _cased(prompt: str, generator: torch.Generator) -> str:
    return pick((str.lower, str.lower, str.capitalize, str.title, str.upper), generator)(prompt)


def measure_long(tiny: Tiny, count: int, seconds: float = 20.0, seed: int = 0) -> dict[str, float]:
    """20 s: the shape stays, in its colour; nothing steps when the first frames leave the window."""
    preset = tiny.model.preset
    chunks = preset.sampling.chunks_for_seconds(seconds)
    scenes = scenes_for(count, 1000 * seed + 2)
    seen = watch(tiny, scenes, chunks, seed=1000 * seed)
    good = [s.present & torch.tensor([name == scene.colour for name in s.colour]) for scene, s in zip(scenes, seen)]
    at = borders(chunks)
    leaving = preset.cache.window // preset.sampling.chunk - 1  # index of the border at which frames leave first
    result = {
        "there and of the right colour, frames": share(g.float().mean() for g in good),
        "the same in the last 5 s": share(g[-80:].float().mean() for g in good),
        "shape right, frames": share(name == scene.shape for scene, s in zip(scenes, seen) for name in s.shape),
    }
    for name, values in (
        ("size, %", torch.stack([100 * s.area / s.area.median() for s in seen])),
        ("brightness, of 255", torch.stack([127.5 * s.background.mean(1) for s in seen])),
    ):
        # Mean over the videos of the second before and after: noise of single frames is not a step.
        steps = (
            torch.stack([values[:, b : b + 8].mean(1) - values[:, b - 8 : b].mean(1) for b in at], 1).abs().median(0)
        )
        result[f"step in {name}: where frames start to leave"] = float(steps.values[leaving])
        result[f"step in {name}: at any border"] = float(steps.values.median())
    return result


def measure_minutes(
    tiny: Tiny, count: int, cache: CacheConfig, minutes: float = 5.0, seed: int = 0
) -> dict[str, float]:
    """Minutes of video: the right shape and colour to the end, of the same size on the same background.

    Of every eight chunks one is decoded, behind the one before it, which the decoder needs to have seen.
    """
    scenes = scenes_for(count, 1000 * seed + 8)
    chunks = tiny.model.preset.sampling.chunks_for_seconds(60 * minutes)
    with torch.inference_mode():
        prompt = tiny.text.encode([scene.prompt for scene in scenes])
    seen: list[list[Sighting]] = []
    latest: list[torch.Tensor] = []
    with RollingSession(tiny.model, prompt, height=SIDE, width=SIDE, batch=count, cache=cache) as session:
        for index, chunk in enumerate(session.generate(chunks, seed=1000 * seed)):
            latest = [*latest[-1:], chunk.latents]
            if index % 8 == 7:
                frames = WAN_21.temporal * chunk.latents.shape[2]
                with torch.inference_mode():
                    videos = tiny.vae.decoder().decode(to_raw(torch.cat(latest, 2)))
                seen.append([detect(video[:, -frames:]) for video in videos])
    good = torch.stack([torch.cat([right(scene, row[i]) for row in seen]).float() for i, scene in enumerate(scenes)])
    size = torch.tensor([[float(s.size.median()) for s in row] for row in seen])
    light = torch.tensor([[127.5 + 127.5 * float(s.background.mean()) for s in row] for row in seen])
    fifth = len(seen) // 5
    begin, end = slice(fifth), slice(-fifth, None)
    drift = {
        "size, % of it": 100 * (size[end].mean(0) / size[begin].mean(0) - 1),
        "brightness, % of the range": (light[end].mean(0) - light[begin].mean(0)) / 2.55,
    }
    return {
        "right shape and colour, frames": float(good.mean()),
        "the same in the worst of the videos, frames": float(good.mean(1).min()),
        **{f"drift of {name}, mean": float(values.abs().mean()) for name, values in drift.items()},
        **{f"drift of {name}, worst": float(values.abs().max()) for name, values in drift.items()},
    }


def measure_switch(tiny: Tiny, count: int, chunks: int = 8, seed: int = 0) -> dict[str, float]:
    """The prompt names another colour from the middle on."""
    generator = torch.Generator().manual_seed(1000 * seed + 3)
    scenes = [random_scene(generator) for _ in range(count)]
    names = list(COLOURS)
    turn = [1 + int(torch.randint(len(names) - 1, (), generator=generator)) for _ in scenes]
    others = [replace(s, colour=names[(names.index(s.colour) + t) % len(names)]) for s, t in zip(scenes, turn)]
    seen = switched(tiny, scenes, others, chunks, seed)
    at = borders(chunks)
    middle, later = at[chunks // 2 - 1], at[chunks // 2 + 1]
    errors = latent_errors(seen)
    return {
        "old colour before, frames": share(n == a.colour for a, s in zip(scenes, seen) for n in s.colour[:middle]),
        "new colour in the first chunk, frames": share(
            n == b.colour for b, s in zip(others, seen) for n in s.colour[middle : at[chunks // 2]]
        ),
        "new colour from the second chunk's end on, frames": share(
            n == b.colour for b, s in zip(others, seen) for n in s.colour[later - 1 :]
        ),
        "error at the switch, px": float(errors[:, chunks // 2 * 3 - 2].median()),
        "error elsewhere, px": float(errors.median()),
    }


def measure_changes(tiny: Tiny, count: int, chunks: int = 8, seed: int = 0) -> dict[str, float]:
    """The prompt names another shape, background or speed from the middle on; two chunks later it is so."""
    generator = torch.Generator().manual_seed(1000 * seed + 7)
    later, result = borders(chunks)[chunks // 2 + 1], {}
    for kind, choices in (("shape", SHAPES), ("background", BACKGROUNDS), ("speed", SPEEDS)):
        scenes = [random_scene(generator) for _ in range(count)]
        others = [
            replace(scene, **{kind: pick([value for value in choices if value != getattr(scene, kind)], generator)})
            for scene in scenes
        ]
        # A background that is not said stays as it is.
        texts = [s.prompt if s.background != "black" else s.prompt + " on a black background" for s in others]
        good = []
        for scene, s in zip(others, switched(tiny, scenes, texts, chunks, seed)):
            if kind == "shape":
                good.append(share(name == scene.shape for name in s.shape[later:]))
            elif kind == "background":
                ground = torch.tensor(BACKGROUNDS[scene.background]) / 127.5 - 1
                good.append(float((s.background[later:] - ground).abs().amax(1).lt(0.1).float().mean()))
            else:
                good.append(abs(pace(s.position[later:]) - SPEEDS[scene.speed]) < 0.2)
        result[f"new {kind}, {'videos' if kind == 'speed' else 'frames'}"] = share(good)
    return result


def switched(tiny: Tiny, scenes: list[Scene], others: list, chunks: int, seed: int) -> list[Sighting]:
    """What is seen in videos whose prompt is that of `scenes` in the first half, and of `others`, or these texts, then."""
    seen = []
    for begin in range(0, len(scenes), BATCH):
        part = slice(begin, begin + BATCH)
        first = [scene.prompt for scene in scenes[part]]
        then = [other if isinstance(other, str) else other.prompt for other in others[part]]
        rows = [first] * (chunks // 2) + [then] * (chunks // 2)
        seen += [detect(video) for video in tiny.sample(rows, 1000 * seed + begin)[0]]
    return seen


def measure_lora(tiny: Tiny, path: Path, count: int, chunks: int = 5, seed: int = 0) -> dict[str, float]:
    """The rows of the background with the LoRA and without it: how much lighter every second one is, of 255."""
    row = [scene.prompt for scene in scenes_for(count, 1000 * seed + 9)]
    shades = []
    for loras in ([(load_lora(path), 1.0)], []):
        with applied_loras(tiny.model, loras):
            videos, _ = tiny.sample([row] * chunks, 1000 * seed)
        rows = videos.mean(1).unflatten(2, (-1, STRIPE)).median(4).values.mean(3)  # [B, T, 8]
        shades.append(127.5 * (rows[..., 1::2] - rows[..., ::2]).mean(2).abs())
    return {
        "striped, frames": float((shades[0] - STRIPE_SHADE).abs().lt(15).float().mean()),
        "shade of the stripes with the LoRA, of 255": float(shades[0].mean()),
        "shade of the stripes without it, of 255": float(shades[1].mean()),
    }


def measure_vae(tiny: Tiny, count: int, seed: int = 0) -> dict[str, float]:
    """PSNR of encoding and decoding unseen clips of 33 frames."""
    generator = torch.Generator().manual_seed(1000 * seed + 4)
    scenes = [random_scene(generator) for _ in range(count)]
    paths = torch.stack([trajectory(scene, random_start(scene, generator), 33) for scene in scenes])
    frames = render(scenes, paths)
    with torch.inference_mode():
        again = torch.cat([tiny.vae.decoder().decode(tiny.vae.encode_video(clip)) for clip in frames.split(1)])
    return {"PSNR, dB": float(10 * torch.log10(4 / (again - frames).square().mean()))}


def table(title: str, values: dict[str, float]) -> str:
    rows = [
        f"| {name} | {100 * value:.1f} % |"
        if "frames" in name.split(", ")[-1:] or "videos" in name.split(", ")[-1:]
        else f"| {name} | {value:.2f} |"
        for name, value in values.items()
    ]
    return "\n".join([f"| {title} | |", "|---|---|", *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise; the tests take 0")
    parser.add_argument("--count", type=int, default=100, help="prompts, each with a seed of its own")
    parser.add_argument("--long", type=int, default=40, help="videos of 20 s")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of ten long videos, 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tiny, count, seed = Tiny.load(arguments.folder), arguments.count, {"seed": arguments.seed}
    cache, minutes = tiny.model.preset.cache, arguments.minutes
    lora = arguments.folder / LORA
    runs = [
        (f"VAE, {count} unseen clips", lambda: measure_vae(tiny, count, **seed)),
        (f"4 steps, {count} prompts and seeds", lambda: measure_prompts(tiny, count, **seed)),
        (f"other words, {count} prompts", lambda: measure_words(tiny, count, **seed)),
        (f"colour change, {count} prompts", lambda: measure_switch(tiny, count, **seed)),
        (f"other changes, {count} prompts each", lambda: measure_changes(tiny, count, **seed)),
        (f"20 s, {arguments.long} videos", lambda: measure_long(tiny, arguments.long, **seed)),
    ]
    if lora.is_file():
        runs.append((f"LoRA, {count // 5} prompts", lambda: measure_lora(tiny, lora, count // 5, **seed)))
    if minutes:
        for positions in ("absolute", "window"):
            rule = replace(cache, positions=positions)
            title = f"{minutes:g} minutes, {positions} positions, 10 videos"
            runs.append((title, lambda rule=rule: measure_minutes(tiny, 10, rule, minutes, **seed)))
    for title, run in runs:
        since = time.time()
        print(table(title, run()), flush=True)
        print(f"({time.time() - since:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
