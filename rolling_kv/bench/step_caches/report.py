"""What the benchmark of the step caches says: a description, a table, JSON and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from PIL import Image

from ...atomic import replacing
from ...step_cache import METHODS
from ..chart import Axis, draw
from ..figures import hardware, machine, markdown, number, size
from .experiment import StepCacheExperiment, StepCacheResult

COLUMNS = {"psnr": ("PSNR, dB", ".1f"), "ssim": ("SSIM", ".3f"), "lpips": ("LPIPS", ".3f")}
"""Heading and form of each measure of `similarity.Similarity`."""


def describe(experiment: StepCacheExperiment) -> str:
    """Two lines: model and run, then the machine."""
    config, sampling = experiment.model.config, experiment.sampling
    steps = sampling.passes
    if experiment.mode == "bidirectional":
        length = f"{experiment.clip_frames} latent frames at once"
    else:
        length = f"{_count(experiment.chunks, 'chunk')} of {sampling.chunk}, window {experiment.cache.window}"
    return (
        f"{experiment.mode}: {experiment.model.preset.name}, {config.num_layers} layers, "
        f"dim {config.num_attention_heads * config.attention_head_dim}; {experiment.height}x{experiment.width}, {length}; "
        f"{_count(steps, 'step')} of {sampling.sampler}, guidance {sampling.guidance_scale:g}, "
        f"{str(experiment.model.dtype).removeprefix('torch.')}\n"
        f"{hardware(experiment.model.compute_device())}; {_count(len(experiment.seeds), 'video')}"
    )


def change_note(experiment: StepCacheExperiment, change: Sequence[float]) -> str:
    """A sentence on what `run.step_change` measured: what a skipped step would cost."""
    if not change:
        return "It makes a chunk in a single step."
    return (
        f"From one of the {experiment.sampling.passes_at(0)} steps to the next the prediction changes by "
        f"{100 * median(change):.0f} % (median; {100 * min(change):.0f} to {100 * max(change):.0f} %): that is the "
        "error a skipped step puts into the video."
    )


def table(results: Sequence[StepCacheResult]) -> str:
    """A Markdown table. Skipped: self-attention, cross-attention and feed-forward calls left out, of all there were."""
    quality, extra = _qualities(results), list(results[0].extra)
    with_peak = any(result.peak_bytes is not None for result in results)
    head = ["method", "strength", "seconds", "speed-up", "skipped: self", "cross", "ffn", "its memory"]
    head += ["peak memory"] * with_peak + [COLUMNS[name][0] for name in quality] + extra
    rows = []
    for result in results:
        report = result.report
        row = [result.method, result.strength, f"{median(result.seconds):.2f}"]
        row.append(f"{result.speed_up:.2f}" if report else "1")
        row += [f"{report.skipped(part):.0%}" for part in report.possible] if report else ["", "", ""]
        row += [size(report.nbytes) if report else ""] + [size(result.peak_bytes)] * with_peak
        values = [(result.quality.get(name), COLUMNS[name][1]) for name in quality]
        row += ["same" if value == math.inf else number(value, form) for value, form in values]
        rows.append(row + [f"{result.extra[name]:.2f}" for name in extra])
    return "\n".join(markdown(head, rows))


def constants_notes(constants: Mapping[str, Sequence[float]]) -> list[str]:
    """The constants that were measured, of each method that needs some, as its setting in the Step Cache node takes them."""
    return [
        f"{METHODS[name].title}'s constants of this model: {', '.join(f'{value:.4f}' for value in values)}"
        for name, values in constants.items()
    ]


def as_json(
    experiment: StepCacheExperiment,
    results: Sequence[StepCacheResult],
    constants: Mapping[str, Sequence[float]],
    change: Sequence[float] = (),
) -> dict:
    """Everything that was measured.

    results, constants: what `run.measure` gave
    change: what `run.step_change` gave, in few-step sampling

    psnr is null where the videos are equal; the uncached ones themselves have no quality.
    """
    entries = []
    for result in results:
        entry = asdict(result) | {"speed_up": result.speed_up, "report": result.report and result.report._asdict()}
        entry["quality"] = {n: None if value == math.inf else value for n, value in result.quality.items()}
        del entry["videos"]
        entries.append(entry)
    return {
        "setting": describe(experiment),
        "machine": machine(experiment.model.compute_device()),
        "mode": experiment.mode,
        "sampling": asdict(experiment.sampling),
        **{method.constants: list(constants.get(name, ())) for name, method in METHODS.items() if method.constants},
        "step_change": list(change),
        "results": entries,
    }


def plot(experiment: StepCacheExperiment, results: Sequence[StepCacheResult]) -> Image.Image:
    """PSNR over speed-up, one curve per method from gentle to strong; without quality, the share of skipped work."""
    with_quality = bool(_qualities(results))
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in results[1:]:
        skipped = result.report.skipped() if result.report else 0.0
        shown = result.quality["psnr"] if with_quality else 100 * skipped
        curves.setdefault(result.method, []).append((result.speed_up, shown))
    label = "PSNR against the uncached video, dB" if with_quality else "work left out, %"
    return draw(curves, Axis("speed-up"), Axis(label, exact="same"), describe(experiment), mark_x=1.0)


def write_plot(path: Path, experiment: StepCacheExperiment, results: Sequence[StepCacheResult]) -> None:
    """Save `plot` as a PNG file. Raises ValueError if nothing but the uncached run was measured."""
    with replacing(path) as file:
        plot(experiment, results).save(file, format="png")


def _qualities(results: Sequence[StepCacheResult]) -> list[str]:
    return list(next((result.quality for result in results if result.quality), {}))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
