"""The tables of presets in the help pages of Load Causal Video Model, from the records of the presets."""

from __future__ import annotations

import re
from pathlib import Path

from rolling_kv.config import SamplingConfig
from rolling_kv.presets import PRESETS, ModelPreset

from ..comfyui.env import PACK
from .files import write
from .readme import table

PAGES = PACK / "web" / "docs" / "RollingKVLoadModel"
HEADS = {
    "en": ["Preset", "Chunk", "Window", "Sink", "Rules", "Sampling"],
    "zh": ["预设", "分块", "窗口", "汇聚帧", "规则", "采样"],
}
CHINESE = (  # the phrases of `ModelPreset.rules`
    (r"positions in the window that end at (\d+)", r"位置按窗口，终于 \1"),
    (r"positions in the window", "位置按窗口"),
    (r"what leaves averaged into the sink", "离开的帧平均到汇聚帧中"),
    (r"what leaves averaged into (\d+) memory frames", r"离开的帧平均到 \1 个记忆帧中"),
    (r"a sink for every shot too", "每个镜头另有汇聚帧"),
    (r"recomputed before every chunk", "每个分块之前重新计算"),
    (r"window computed anew at a switch", "切换提示词时重新计算窗口"),
)


def sampling_of(preset: ModelPreset, language: str) -> str:
    """How many steps a chunk takes, and the guidance, as the page's language says it."""
    sampling = preset.sampling
    steps, first, scale = sampling.passes, sampling.first_passes, f"{sampling.guidance_scale:g}"
    shifted = sampling.shift != SamplingConfig.shift
    if language == "zh":
        text = (
            f"{steps} 步"
            + ("，同样多的分块一起去噪" if sampling.joint else "")
            + (f"，引导 {scale}" if sampling.guided else "")
        )
        chunks = "第一个分块" if len(first) == 1 else f"前 {len(first)} 个分块"
        text += f"，{chunks} {'、'.join(map(str, first))} 步" if first else ""
        return text + (f"，偏移 {sampling.shift:g}" if shifted else "")
    text = f"{steps} step{'s' * (steps != 1)}" + (" of as many chunks at once" if sampling.joint else "")
    text += f" with guidance {scale}" if sampling.guided else ""
    text += f", the first chunk{'s' * (len(first) > 1)} {' and '.join(map(str, first))}" if first else ""
    return text + (f", shift {sampling.shift:g}" if shifted else "")


def rules_of(preset: ModelPreset, language: str) -> str:
    """What its cache does beside keeping a window. Raises KeyError for a phrase that nobody has translated."""
    if language == "en":
        return ", ".join(preset.rules())
    return "，".join(map(_chinese, preset.rules()))


def _chinese(phrase: str) -> str:
    for pattern, text in CHINESE:
        if re.fullmatch(pattern, phrase):
            return re.sub(pattern, text, phrase)
    raise KeyError(phrase)


def presets_table(language: str) -> str:
    """What each preset sets, as Markdown."""
    rows = [
        [
            f"`{preset.name}`",
            str(preset.sampling.chunk),
            str(preset.cache.window),
            str(preset.cache.sink),
            rules_of(preset, language),
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
