"""Measure a tiny model as a viewer would: sample through the rolling cache, decode, and read the pixels.

    python -m tools.train_tiny.measure models/tiny --count 100

Prints a table in Markdown, as it stands in docs/tiny-model.md.
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
from rolling_kv.sampling.session import RollingSession
from rolling_kv.text import load_text_encoder
from rolling_kv.vae.latents import to_raw
from rolling_kv.vae.loading import load_vae

from .detector import Sighting, detect, direction, prediction_errors
from .world import COLOURS, SIDE, STRAIGHT_FRAMES, Scene, random_scene, random_start, render, trajectory

BATCH = 20


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
            return self.vae.decoder().decode(to_raw(latents)), latents


def borders(chunks: int, chunk: int = 3) -> list[int]:
    """Pixel frames at which chunks begin, the first chunk left out."""
    return [WAN_21.pixel_frames(chunk * index) for index in range(1, chunks)]


def scenes_for(count: int, seed: int) -> list[Scene]:
    generator = torch.Generator().manual_seed(seed)
    return [random_scene(generator) for _ in range(count)]


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
    return sum(values) / len(values)


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


def measure_prompts(tiny: Tiny, count: int, chunks: int = 5, **options) -> dict[str, float]:
    """Colour, shape and direction as the prompt says; smoothness at borders, with the cache and without."""
    scenes = scenes_for(count, 1)
    seen = watch(tiny, scenes, chunks, **options)
    border, inside = border_errors(seen)
    first = border_errors(seen, frames=slice(0, 1))
    alone, _ = border_errors(watch(tiny, scenes, chunks, CacheConfig(window=3), **options))
    pairs = list(zip(scenes, seen))
    return {
        "shape is there, frames": share(s.present.float().mean() for s in seen),
        "colour right, frames": share(name == scene.colour for scene, s in pairs for name in s.colour),
        "shape right, frames": share(name == scene.shape for scene, s in pairs for name in s.shape),
        "direction right, videos": share(
            direction(s.position[:STRAIGHT_FRAMES]) == scene.direction for scene, s in pairs
        ),
        "error at borders, px": border,
        "error inside chunks, px": inside,
        "border / inside": border / inside,
        "the same, first pixel frame of each latent frame only": first[0] / first[1],
        "error at borders without the cache, px": alone,
        "without / with the cache": alone / border,
    }


def measure_long(tiny: Tiny, count: int, seconds: float = 20.0) -> dict[str, float]:
    """20 s: the shape stays, in its colour; nothing steps when the first frames leave the window."""
    preset = tiny.model.preset
    chunks = preset.sampling.chunks_for_seconds(seconds)
    scenes = scenes_for(count, 2)
    seen = watch(tiny, scenes, chunks)
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


def measure_switch(tiny: Tiny, count: int, chunks: int = 8) -> dict[str, float]:
    """The prompt names another colour from the middle on."""
    generator = torch.Generator().manual_seed(3)
    scenes = [random_scene(generator) for _ in range(count)]
    names = list(COLOURS)
    turn = [1 + int(torch.randint(len(names) - 1, (), generator=generator)) for _ in scenes]
    others = [replace(s, colour=names[(names.index(s.colour) + t) % len(names)]) for s, t in zip(scenes, turn)]
    seen = []
    for begin in range(0, count, BATCH):
        part = slice(begin, begin + BATCH)
        rows = [[s.prompt for s in scenes[part]]] * (chunks // 2) + [[s.prompt for s in others[part]]] * (chunks // 2)
        seen += [detect(video) for video in tiny.sample(rows, begin)[0]]
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


def measure_vae(tiny: Tiny, count: int) -> dict[str, float]:
    """PSNR of encoding and decoding unseen clips of 33 frames."""
    generator = torch.Generator().manual_seed(4)
    scenes = [random_scene(generator) for _ in range(count)]
    paths = torch.stack([trajectory(scene, random_start(scene, generator), 33) for scene in scenes])
    frames = render(scenes, paths)
    with torch.inference_mode():
        again = tiny.vae.decoder().decode(tiny.vae.encode_video(frames))
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
    parser.add_argument("--count", type=int, default=100, help="prompts, each with a seed of its own")
    parser.add_argument("--long", type=int, default=40, help="videos of 20 s")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tiny = Tiny.load(arguments.folder)
    for title, run in (
        (f"VAE, {arguments.count} unseen clips", lambda: measure_vae(tiny, arguments.count)),
        (f"4 steps, {arguments.count} prompts and seeds", lambda: measure_prompts(tiny, arguments.count)),
        (f"colour change, {arguments.count} prompts", lambda: measure_switch(tiny, arguments.count)),
        (f"20 s, {arguments.long} videos", lambda: measure_long(tiny, arguments.long)),
    ):
        since = time.time()
        print(table(title, run()), flush=True)
        print(f"({time.time() - since:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
