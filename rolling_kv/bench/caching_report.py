"""What the benchmark of the step caches says: similarity of two videos, table, JSON and plot."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from uuid import uuid4

import torch

from .report import _markdown, _number, _size, machine

if TYPE_CHECKING:
    from .caching import Measured, Setting

SAME_DB = 80
"""Where a video that equals the uncached one stands in the plot."""


def check_quality() -> None:
    """Raise ValueError, before anything is measured, if videos could not be compared."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("comparing videos needs torchmetrics, which is not installed: pip install torchmetrics")


def similarity(frames: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    """PSNR in dB over the whole video, and the mean SSIM of its frames; both [3, T, H, W] in [-1, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ours, theirs = ((video.transpose(0, 1) + 1) / 2 for video in (frames, original))
    return {
        "psnr": peak_signal_noise_ratio(ours, theirs, data_range=1.0).item(),
        "ssim": structural_similarity_index_measure(ours, theirs, data_range=1.0).item(),
    }


def describe(setting: Setting) -> str:
    config, sampling = setting.model.transformer.config, setting.sampling
    here = machine(setting.model.compute_device())
    cpu = f"{here['cpu']}, {here['threads']} threads"
    steps = sampling.passes_at(1)
    if setting.mode == "bidirectional":
        length = f"{setting.chunks * sampling.chunk} latent frames at once"
    else:
        length = f"{setting.chunks} chunks of {sampling.chunk}, window {setting.cache.window}"
    return (
        f"{setting.mode}: {setting.model.preset.name}, {config.num_layers} layers, "
        f"dim {config.num_attention_heads * config.attention_head_dim}; {setting.height}x{setting.width}, {length}; "
        f"{steps} steps of {sampling.sampler}, guidance {sampling.guidance_scale:g}, "
        f"{str(setting.model.dtype).removeprefix('torch.')}\n"
        f"{here.get('gpu', cpu)}, torch {here['torch']}; {len(setting.seeds)} videos"
    )


def table(setting: Setting, results: Sequence[Measured]) -> str:
    """A Markdown table. Skipped: self-attention, cross-attention and feed-forward calls left out, of all there were."""
    extra = list(results[0].extra)
    head = ["method", "strength", "seconds", "speed-up", "skipped: self", "cross", "ffn", "its memory", "peak memory"]
    head += ["PSNR, dB", "SSIM", *extra] if setting.vae is not None else []
    rows = []
    for result in results:
        report = result.report
        row = [result.method, result.strength, f"{median(result.seconds):.2f}"]
        row.append(f"{result.speed_up:.2f}" if report else "1")
        row += [f"{report.skipped(part):.0%}" for part in report.possible] if report else ["", "", ""]
        row += [_size(report.nbytes) if report else "", _size(result.peak_bytes)]
        if setting.vae is not None:
            row += ["same" if result.psnr == math.inf else _number(result.psnr, ".1f"), _number(result.ssim, ".3f")]
            row += [f"{result.extra[name]:.2f}" for name in extra]
        rows.append(row)
    return "\n".join(_markdown(head, rows))


def as_json(setting: Setting, results: Sequence[Measured], ratios: Sequence[float]) -> dict:
    """Everything measured. psnr is null where the videos are equal (ssim 1), and for the uncached ones themselves."""
    return {
        "setting": describe(setting),
        "machine": machine(setting.model.compute_device()),
        "mode": setting.mode,
        "sampling": asdict(setting.sampling),
        "mag_ratios": list(ratios),
        "results": [
            asdict(result)
            | {"speed_up": result.speed_up, "report": result.report._asdict() if result.report else None}
            | ({"psnr": None} if result.psnr == math.inf else {})
            for result in results
        ],
    }


def write_plot(path: Path, setting: Setting, results: Sequence[Measured]) -> None:
    """Quality over speed-up, one curve per method; without quality, the share of skipped work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(result.method for result in results[1:]):
        points = [result for result in results if result.method == method]
        ups = [result.speed_up for result in points]
        shown = [p.report.skipped() if p.psnr is None else min(p.psnr, SAME_DB) for p in points]
        axes.plot(*zip(*sorted(zip(ups, shown))), marker="o", label=method)
    quality = "skipped work" if setting.vae is None else "PSNR against the uncached video, dB"
    axes.set(xlabel="speed-up", ylabel=quality)
    axes.set_title(describe(setting), fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        figure.savefig(unfinished, format="png", dpi=120)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
