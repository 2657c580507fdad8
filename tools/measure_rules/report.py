"""The tables and pictures of docs/models.md, from the runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from rolling_kv.cache.joint import JointKVCache
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.config import CacheConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.recomputed import context_passes

from ..comfyui.env import PACK
from ..generate.files import as_json, write
from ..generate.models import PAGE
from ..generate.readme import table
from ..train_tiny.world import SIDE
from .metrics import long_figures, switch_figures
from .rules import METHODS, SWITCHES
from .sample import BORDER, CHUNK, EVERY, read, scene_of, slug

MEASURED = Path(__file__).parent / "measured.json"
IMAGES = PACK / "docs" / "images"
LENGTHS = {"60 s": 60, "5 min": 300}
STRETCH_SECONDS = EVERY * 12 / WAN_21.fps
SHOWN = 11
"""Frames of each row of a picture."""
LABEL = 180


def summarise(folder: Path) -> None:
    """Write measured.json and the pictures from the runs in `folder`."""
    records = read(folder / "switch.jsonl")
    by_rule = {rule.name: [record for record in records if record["rule"] == rule.name] for rule in SWITCHES}
    content = {
        "switch": {
            name: switch_figures(runs, [scene_of(run["seed"]) for run in runs], BORDER, CHUNK * WAN_21.temporal)
            for name, runs in by_rule.items()
            if runs
        }
    }
    for name, seconds in LENGTHS.items():
        content[name] = {}
        for method in METHODS:
            videos = long_videos(folder, method.name, seconds)
            if videos:
                figures = long_figures(videos)
                content[name][method.name] = {"videos": len(videos)} | {k: round(v, 3) for k, v in figures.items()}
    write(MEASURED, as_json(content))
    picture(folder, "switch", [rule.name for rule in SWITCHES])
    picture(folder, "long-300", [method.name for method in METHODS if method.minutes])
    picture(folder, "long-60", [method.name for method in METHODS if not method.minutes])


def long_videos(folder: Path, rule: str, seconds: int) -> list[list[dict]]:
    """The stretches of each video of `rule`, up to that length; a longer run is as good, for it begins the same way."""
    videos: dict[int, list[dict]] = {}
    for length in sorted({seconds, *LENGTHS.values()}, reverse=True):
        for record in read(folder / f"long-{length}.jsonl"):
            if record["rule"] == rule and length >= seconds:
                videos.setdefault(record["seed"], record["stretches"][: int(seconds / STRETCH_SECONDS)])
    return [videos[seed] for seed in sorted(videos)]


def picture(folder: Path, kind: str, names: list[str], seed: int = 0) -> None:
    """A row of frames for each rule, as docs/images/rules-<kind>.png."""
    strips = {name: folder / f"{kind}-{slug(name)}-{seed}.png" for name in names}
    rows = [(name, Image.open(path)) for name, path in strips.items() if path.is_file()]
    if not rows:
        return
    whole = Image.new("RGB", (LABEL + SHOWN * (SIDE + 2), len(rows) * (SIDE + 2)), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(14)
    for row, (name, image) in enumerate(rows):
        top, count = row * (SIDE + 2), image.width // SIDE
        pen.text((6, top + SIDE // 2), name, fill="#222222", font=font, anchor="lm")
        chosen = range(SHOWN) if kind == "switch" else [round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)]
        for place, index in enumerate(chosen):
            frame = image.crop((index * SIDE, 0, (index + 1) * SIDE, SIDE))
            whole.paste(frame, (LABEL + place * (SIDE + 2), top))
    IMAGES.mkdir(exist_ok=True)
    whole.quantize(128).save(IMAGES / f"rules-{kind}.png", optimize=True)


def tables(measured: dict) -> dict[str, str]:
    """Each table of the page as Markdown, by the name of its markers."""
    return {
        "methods": methods_table(measured),
        "minutes": minutes_table(measured["5 min"]),
        "switches": switches_table(measured["switch"]),
    }


def methods_table(measured: dict) -> str:
    rows = [
        [
            "Method",
            "What it does",
            "Passes a chunk",
            "Cache",
            "Window, sink here",
            "Colour",
            "Shape",
            "Speed",
            "Brightness",
            "Size",
        ]
    ]
    for method in METHODS:
        preset = method.real
        name = method.name if preset.source == "" else f"[{method.name}]({preset.source})"
        seen = measured["60 s"].get(method.name)
        kept = f"{preset.cache.window}/{preset.cache.sink}"
        rows.append(
            [
                name,
                method.says,
                passes(preset),
                f"{cache_bytes(preset) / 2**30:.1f} GiB ({kept})",
                f"{method.cache.window}, {method.cache.sink}",
                *shown(seen),
            ]
        )
    return table(rows)


def minutes_table(measured: dict) -> str:
    rows = [["Five minutes", "Colour", "Colour, last minute", "Shape", "Speed", "Brightness", "Size"]]
    for name, seen in measured.items():
        colour, *rest = shown(seen)
        rows.append([name, colour, f"{100 * seen['last']:.0f} %", *rest])
    return table(rows)


def switches_table(measured: dict) -> str:
    rows = [
        [
            "Switch",
            "Window, sink",
            "More passes",
            "Frames until the new colour",
            "Never",
            "Jump",
            "Farthest",
            "Next border",
            "Shape",
        ]
    ]
    for rule in SWITCHES:
        if seen := measured.get(rule.name):
            frames = "" if seen["frames"] is None else f"{seen['frames']:g} (at most {seen['slowest']})"
            rows.append(
                [
                    rule.name,
                    f"{rule.cache.window}, {rule.cache.sink}",
                    str(seen["passes"]),
                    frames,
                    f"{seen['never']} of {seen['videos']}",
                    f"{seen['jump']:.1f} px",
                    f"{seen['farthest']:.0f} px",
                    f"{seen['later']:.1f} px",
                    f"{100 * seen['shape']:.0f} %",
                ]
            )
    return table(rows)


def shown(seen: dict | None) -> list[str]:
    if seen is None:
        return ["not measured", "", "", "", ""]
    return [
        f"{100 * seen['colour']:.0f} %",
        f"{100 * seen['shape']:.0f} %",
        f"{seen['speed']:.2f}",
        f"{round(seen['brightness'], 1) + 0.0:+.1f}",  # the sum makes a zero of a minus zero
        f"{round(seen['size']) + 0:+} %",
    ]


def passes(preset: ModelPreset) -> str:
    """Of a chunk in the middle of a video."""
    sampling, cache = preset.sampling, preset.cache
    if sampling.joint:
        return f"2, one of them over {sampling.passes} chunks"
    context = 1
    if cache.context == "recomputed":
        context = context_passes(cache, sampling, 30 * sampling.chunk, 1)
    return str(sampling.passes + context)


def cache_bytes(preset: ModelPreset) -> int:
    """Bytes that keys, values and averages take at 480x832 in a model of 1.3B parameters, in bfloat16."""
    height, width = WAN_21.latent_size(*WAN_21.size)
    shape = CacheShape(
        30, 1, WAN_21.tokens_per_frame(height, width), 12, 128, torch.bfloat16, WAN_21.grid(height, width)
    )
    kind = JointKVCache if preset.sampling.joint else RollingKVCache
    config: CacheConfig = preset.cache
    return kind.bytes_kept(shape, config, config.limit or 0).device


def rewritten(text: str, measured: dict) -> str:
    """The page with its tables as they should be, between `<!-- measured: NAME -->` and `<!-- end -->`."""
    for name, content in tables(measured).items():
        mark = f"<!-- measured: {name} -->\n"
        text, found = re.subn(
            f"{re.escape(mark)}.*?<!-- end -->", lambda _: f"{mark}{content}<!-- end -->", text, count=1, flags=re.S
        )
        if not found:
            raise ValueError(f"{PAGE.name} has no place for the table of {name}: add {mark.strip()} and <!-- end -->")
    return text


def write_tables() -> None:
    """Write the tables of docs/models.md."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    write(PAGE, rewritten(PAGE.read_text(encoding="utf-8"), measured))
