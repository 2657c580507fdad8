"""Sampling the bundled model by a rule, and what is kept of a run: one line of JSON, and a few of its frames."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from rolling_kv.bundled import BUNDLED
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.sampling.schedule import seeded_noise
from rolling_kv.sampling.session import RollingSession
from rolling_kv.vae.latents import to_raw

from ..train_tiny.detector import detect
from ..train_tiny.measure import Tiny
from ..train_tiny.world import COLOURS, SIDE, Scene, pick, random_scene
from .metrics import coloured, shaped, stretch
from .rules import METHODS, SWITCHES, Method, Switch

CHUNK = 3
BEFORE, AFTER, SHOWN_BEFORE = 4, 4, 1
"""Chunks of a run with a switch: before it, after it, and how many of those before it are decoded."""
BORDER = WAN_21.pixel_frames(CHUNK * SHOWN_BEFORE)
"""The first of the decoded frames that belongs to the chunk after the switch."""
EVERY = 8
"""Of every eight chunks of a long video, 6 s, the first is decoded, by a stream of its own: 9 frames."""
THUMBNAILS = 17
"""Frames of a run that are kept as a picture."""


def scene_of(seed: int) -> Scene:
    return random_scene(torch.Generator().manual_seed(seed))


def other_colour(seed: int, scene: Scene) -> Scene:
    generator = torch.Generator().manual_seed(10_000 + seed)
    return replace(scene, colour=pick([colour for colour in COLOURS if colour != scene.colour], generator))


class Bundled:
    """The bundled model. All draws are those of a video's own seed, however many are made at once."""

    def __init__(self, folder: Path = BUNDLED):
        self.tiny = Tiny.load(folder)
        self.passes = 0

    def session(self, scenes: list[Scene], cache: CacheConfig, sampling: SamplingConfig | None = None):
        self.passes = 0
        return RollingSession(
            self.tiny.model,
            self.prompts(scenes),
            height=SIDE,
            width=SIDE,
            batch=len(scenes),
            cache=cache,
            sampling=sampling,
            vae=self.tiny.vae if cache.context == "recomputed" else None,
            on_pass=self._count,
        )

    def _count(self, done: int, total: int) -> None:
        self.passes = done + 1

    def prompts(self, scenes: list[Scene]) -> torch.Tensor:
        with torch.inference_mode():
            return self.tiny.text.encode([scene.prompt for scene in scenes])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames [B, 3, T, 64, 64] in [-1, 1], as of a video that begins here."""
        with torch.inference_mode():
            return self.tiny.vae.decoder().decode(to_raw(latents))


def noise_of(seeds: list[int]):
    def draw(start: int, number: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([seeded_noise(seed, start, (1, *shape[1:]), number) for seed in seeds])

    return draw


def switch_runs(bundled: Bundled, rule: Switch, seeds: list[int]) -> Iterator[tuple[dict, torch.Tensor]]:
    """For each seed, the record of a video whose prompt names another colour from its fifth chunk on, and some frames."""
    scenes = [scene_of(seed) for seed in seeds]
    others = [other_colour(seed, scene) for seed, scene in zip(seeds, scenes)]
    with bundled.session(scenes, rule.cache) as session:
        noise = noise_of(seeds)
        chunks = [chunk.latents for chunk in session.generate(BEFORE, noise_source=noise)]
        plain = session.sampling.passes_for(BEFORE + AFTER)
        session.set_prompt(bundled.prompts(others), switch=rule.switch, blend=rule.blend)
        chunks += [chunk.latents for chunk in session.generate(AFTER, noise_source=noise)]
    videos = bundled.decode(torch.cat(chunks[BEFORE - SHOWN_BEFORE :], 2))
    for seed, scene, other, video in zip(seeds, scenes, others, videos):
        seen = detect(video)
        yield (
            {
                "rule": rule.name,
                "seed": seed,
                "prompt": scene.prompt,
                "to": other.colour,
                "colour": coloured(seen, other.colour),
                "shape": shaped(seen, scene.shape),
                "position": [[round(value, 2) for value in place] for place in seen.position.tolist()],
                "passes": bundled.passes - plain,
            },
            video[:, BORDER - 5 :: 4],
        )


def long_runs(
    bundled: Bundled, method: Method, seeds: list[int], seconds: float
) -> Iterator[tuple[dict, torch.Tensor]]:
    """For each seed, the record of a long video of one prompt, and a frame of each stretch that was decoded."""
    scenes = [scene_of(seed) for seed in seeds]
    session = bundled.session(scenes, method.cache, method.sampling)
    chunks = session.sampling.chunks_for_seconds(seconds)
    seen: list[list[dict]] = [[] for _ in seeds]
    frames: list[list[torch.Tensor]] = [[] for _ in seeds]
    with session:
        for index, chunk in enumerate(session.generate(chunks, noise_source=noise_of(seeds))):
            if index % EVERY == 0:
                for number, video in enumerate(bundled.decode(chunk.latents)):
                    seen[number].append(stretch(detect(video), scenes[number]))
                    frames[number].append(video[:, -1])
    for seed, scene, pieces, shown in zip(seeds, scenes, seen, frames):
        pieces = [{name: round(value, 4) for name, value in piece.items()} for piece in pieces]
        record = {"rule": method.name, "seed": seed, "prompt": scene.prompt, "stretches": pieces}
        yield record | {"passes": bundled.passes}, torch.stack(shown, 1)


def run(kind: str, folder: Path, seeds: list[int], at_once: int, seconds: float, only: list[str]) -> None:
    """Make the runs that `folder` does not hold yet: a line of `<kind>.jsonl` and a strip of frames each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, bundled = folder / f"{kind}.jsonl", Bundled()
    rules = SWITCHES if kind == "switch" else [m for m in METHODS if m.minutes or seconds <= 60]
    for rule in rules:
        if only and rule.name not in only:
            continue
        done = {record["seed"] for record in read(lines) if record["rule"] == rule.name}
        waiting = [seed for seed in seeds if seed not in done]
        for begin in range(0, len(waiting), at_once):
            part = waiting[begin : begin + at_once]
            made = switch_runs(bundled, rule, part) if kind == "switch" else long_runs(bundled, rule, part, seconds)
            for record, frames in made:
                strip(frames).save(folder / f"{kind}-{slug(rule.name)}-{record['seed']}.png")
                with lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")  # one write: a killed run leaves whole lines
            print(f"{kind}: {rule.name}, seeds {part}", flush=True)


def read(lines: Path) -> list[dict]:
    """The records of a file with one a line, none where there is no file."""
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.is_file() else []


def strip(frames: torch.Tensor) -> Image.Image:
    """At most so many of the frames [3, T, H, W] in [-1, 1], evenly chosen, side by side."""
    count = min(THUMBNAILS, frames.shape[1])
    chosen = torch.linspace(0, frames.shape[1] - 1, count).round().long()
    pixels = ((frames[:, chosen] + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(2, 1, 3, 0).flatten(1, 2).numpy())


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
