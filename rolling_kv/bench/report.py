"""What a benchmark says: tables for people, JSON for programs, and a plot."""

from __future__ import annotations

import importlib.util
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from ..atomic import replacing
from ..geometry import WAN_21
from .measure import Result, share_of_floor
from .workload import Workload

ROWS = 24
"""Longest table of chunks; of a longer video it shows the beginning and the end."""


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    known = {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(device)
    return known | {"python": platform.python_version(), "system": platform.system()}


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def summary(workload: Workload, results: list[Result]) -> dict[str, dict]:
    """The figures of the table, by letter: see `tables` for their units."""
    floor = next((result for result in results if result.letter == "e"), None)
    frames = workload.sampling.chunk * WAN_21.temporal
    figures = {}
    for result in results:
        seconds = result.full_seconds(workload)
        peaks = [result.peak_bytes[index] for index in workload.full_window] if result.peak_bytes else []
        figures[result.letter] = {
            "seconds": seconds,
            "frames_per_second": None if result.letter == "e" else frames / seconds,
            "share_of_floor": share_of_floor(workload, result, floor) if floor else None,
            "kv_bytes": max(filter(None, result.kv_bytes), default=None),
            "peak_bytes": max(result.peak_bytes, default=None),
            "peak_growth": max(peaks) / peaks[0] - 1 if peaks else None,
        }
    return figures


def tables(workload: Workload, results: list[Result]) -> str:
    """Two Markdown tables: the figures with a full window, and seconds by chunk number (from 1)."""
    figures = summary(workload, results)
    full = [index + 1 for index in workload.full_window]
    head = ["method", "s per chunk", "frames/s", "of floor", "keys, values", "peak memory", "growth of the peak"]
    rows = [
        [
            f"({result.letter}) {result.title}",
            f"{row['seconds']:.3f}",
            number(row["frames_per_second"], ".2f"),
            number(row["share_of_floor"], ".3f"),
            size(row["kv_bytes"]),
            size(row["peak_bytes"]),
            number(row["peak_growth"], "+.2%"),
        ]
        for result, row in ((result, figures[result.letter]) for result in results)
    ]
    window = "all frames" if workload.cache.unlimited else f"{workload.cache.window} latent frames"
    span = f"chunks {full[0]} to {full[-1]}" if len(full) > 1 else f"chunk {full[0]}"
    lines = [
        f"Window of {window}, {workload.sampling.chunk} per chunk. Medians over {span}"
        f"{'' if reaches_full_window(workload) else ', which does not have a full window'}. Model passes only: "
        f"no text encoder, no VAE. Real time is {WAN_21.fps} frames/s. Growth of the peak: from the first of these chunks to the "
        "largest.",
        "",
        *markdown(head, rows),
        "",
        *(f"({result.letter}) {result.title}: {result.note}." for result in results),
        "",
        *markdown(["chunk", *(f"({result.letter}) s" for result in results)], _chunk_rows(workload, results)),
    ]
    return "\n".join(lines)


def reaches_full_window(workload: Workload) -> bool:
    window = workload.cache.limit
    return window is not None and workload.full_window[0] * workload.sampling.chunk >= window


def _chunk_rows(workload: Workload, results: list[Result]) -> list[list[str]]:
    rows = [
        [str(index + 1), *(f"{result.chunk_seconds(index):.3f}" for result in results)]
        for index in range(workload.chunks)
    ]
    if len(rows) <= ROWS:
        return rows
    return rows[: ROWS // 2] + [["…"] * len(rows[0])] + rows[-ROWS // 2 :]


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (head, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return [f"| {line} |" for line in lines]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def as_json(settings: dict, workload: Workload, results: list[Result]) -> dict:
    """Everything measured. settings: what was asked for, as plain values."""
    return {
        "settings": settings,
        "machine": machine(workload.device),
        "full_window_chunks": [index + 1 for index in workload.full_window],
        "summary": summary(workload, results),
        "methods": {result.letter: asdict(result) for result in results},
    }


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_plot() -> None:
    """Raise ValueError, before anything is measured, if no plot can be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib, or leave --plot out")


def write_plot(path: Path, title: str, workload: Workload, results: list[Result]) -> None:
    """Seconds and peak memory by chunk number, one line per method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with_memory = [result for result in results if result.peak_bytes]
    figure = Figure(figsize=(9, 7 if with_memory else 4), layout="constrained")
    axes = figure.subplots(2 if with_memory else 1, 1, squeeze=False)[:, 0]
    numbers = range(1, workload.chunks + 1)
    for result in results:
        style = {"color": "grey", "linestyle": "--"} if result.letter == "e" else {}
        seconds = [result.chunk_seconds(index) for index in range(workload.chunks)]
        axes[0].plot(numbers, seconds, label=f"({result.letter}) {result.title}", **style)
    axes[0].set(title=title, ylabel="seconds per chunk")
    for result in with_memory:
        axes[1].plot(numbers, [peak / 2**20 for peak in result.peak_bytes], label=f"({result.letter})")
        axes[1].set_ylabel("peak memory, MiB")
    for axis in axes:
        axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
        axis.legend()
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("chunk")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
