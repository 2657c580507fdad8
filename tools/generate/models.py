"""The table of families in docs/models.md, and what is to be said of each, from the records of the presets."""

from __future__ import annotations

import re

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.presets import PRESETS

from ..comfyui.env import PACK
from .files import write
from .readme import described, table

PAGE = PACK / "docs" / "models.md"
HEAD = [
    "Family", "Preset", "Files", "Licence", "Chunk", "Window", "Sink", "Positions", "What leaves", "New prompt", "Steps",
    "Shift", "Recordings",
]  # fmt: skip
SWITCHES = {
    "hold": "",
    "joint": "window anew, at once",
    "causal": "window anew, chunk by chunk",
    "flush": "flush",
    "cut": "cut",
}


def families() -> str:
    """One row for each preset, and a list of what is not as in a family's own code, as Markdown."""
    rows, above, source = [HEAD], None, ""
    for preset in PRESETS.values():
        same_family = above and preset.title == above.title
        source = source if same_family else preset.source
        rows.append(
            [
                "" if same_family else f"[{preset.title}]({source})",
                f"`{preset.name}`" + (f" ([source]({preset.source}))" if preset.source != source else ""),
                "" if same_family and preset.files == above.files else ", ".join(map(described, preset.files)),
                "" if same_family and preset.licence == above.licence else preset.licence,
                str(preset.sampling.chunk),
                str(preset.cache.window),
                _sink(preset.cache),
                _positions(preset.cache),
                _leaving(preset.cache),
                f"a cut after `{preset.cut_marker.strip()}`" if preset.cut_marker else SWITCHES[preset.cache.switch],
                _steps(preset.sampling),
                f"{preset.sampling.shift:g}",
                preset.compared or "none",
            ]
        )
        above = preset
    notes = [f"- `{preset.name}`: {preset.note}\n" for preset in PRESETS.values() if preset.note]
    return table(rows) + "\n" + "".join(notes)


def _sink(cache: CacheConfig) -> str:
    new = ", new at a switch" if cache.sink and not cache.global_sink else ""
    return f"{cache.sink}{new}" + (", and as many of every shot" if cache.shot_sink else "")


def _positions(cache: CacheConfig) -> str:
    return cache.positions + (f", up to {cache.span}" if cache.span else "")


def _leaving(cache: CacheConfig) -> str:
    if cache.context == "recomputed":
        return "recomputed before every chunk"
    if cache.leaving == "ema":
        return f"into the sink, which keeps {cache.ema_alpha:g} of itself"
    if cache.leaving == "memory":
        return f"into two memory frames, {' and '.join(f'{alpha:g}' for alpha in cache.memory_alphas)} of each"
    return ""


def _steps(sampling: SamplingConfig) -> str:
    if not sampling.few_step:
        return f"{sampling.passes}, guidance {sampling.guidance_scale:g}"
    first = [f"chunk {number}: {_listed(steps)}" for number, steps in enumerate(sampling.first_chunk_steps or (), 1)]
    joint = ", of as many chunks at once" if sampling.joint else ""
    return "; ".join([_listed(sampling.denoising_steps) + joint, *first])


def _listed(steps: tuple) -> str:
    return ", ".join(map(str, steps))


def generated() -> str:
    """The page with its table and notes as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"^\| Family \|.*?(?=\n\n[^-])", lambda _: families().rstrip(), text, count=1, flags=re.M | re.S)


def generate() -> None:
    write(PAGE, generated())
