"""The tables of presets in the help pages of Load Causal Video Model, from the records of the presets."""

from __future__ import annotations

import re
from pathlib import Path

from rolling_kv.presets import PRESETS, ModelPreset

from ..comfyui.env import PACK
from .files import write
from .readme import table

PAGES = PACK / "web" / "docs" / "RollingKVLoadModel"
HEADS = {
    "en": ["Preset", "Chunk", "Window", "Sink", "Sampling"],
    "zh": ["预设", "分块", "窗口", "汇聚帧", "采样"],
}


def sampling_of(preset: ModelPreset, language: str) -> str:
    """How many steps a chunk takes, and the guidance, as the page's language says it."""
    sampling = preset.sampling
    steps, first, scale = sampling.passes_at(1), sampling.passes_at(0), f"{sampling.guidance_scale:g}"
    if language == "zh":
        text = f"{steps} 步" + (f"，引导 {scale}" if sampling.guided else "")
        return text + (f"，第一个分块 {first} 步" if first != steps else "")
    text = f"{steps} step{'s' * (steps != 1)}" + (f" with guidance {scale}" if sampling.guided else "")
    return text + (f", the first chunk {first}" if first != steps else "")


def presets_table(language: str) -> str:
    """What each preset sets, as Markdown."""
    rows = [
        [
            f"`{preset.name}`",
            str(preset.sampling.chunk),
            str(preset.cache.window),
            str(preset.cache.sink),
            sampling_of(preset, language),
        ]
        for preset in PRESETS.values()
    ]
    return table([HEADS[language], *rows])


def page(language: str) -> Path:
    return PAGES / f"{language}.md"


def generated(language: str) -> str:
    """The page in that language with its table as it should be."""
    head = re.escape(HEADS[language][0])
    text = page(language).read_text(encoding="utf-8")
    return re.sub(rf"^\| {head} \|(?:.*\n)+?(?=\n)", lambda _: presets_table(language), text, count=1, flags=re.M)


def generate() -> None:
    for language in HEADS:
        write(page(language), generated(language))
