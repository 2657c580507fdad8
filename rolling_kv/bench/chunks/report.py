"""What `bench` says: tables for people, JSON for programs, and a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from PIL import Image

from ...atomic import replacing
from ...geometry import WAN_21
from ..chart import Axis, draw, stack
from ..figures import machine, markdown, number, size, span
from .experiment import Workload
from .run import Result, share_of_floor

ROWS = 24
"""Longest table of chunks; of a longer video it shows the beginning and the end."""


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
    head = ["method", "s per chunk", "frames/s", "of floor", "keys, values", "peak memory", "growth of the peak"]
    rows = [
        [
            _name(result),
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
    lines = [
        f"Window of {window}, {workload.sampling.chunk} per chunk. Medians over {span(workload.full_window)}"
        f"{'' if reaches_full_window(workload) else ', which does not have a full window'}. Model passes only: "
        f"no text encoder, no VAE. Real time is {WAN_21.fps} frames/s. Growth of the peak: from the first of these chunks to the "
        "largest.",
        "",
        *markdown(head, rows),
        "",
        *(f"{_name(result)}: {result.note}." for result in results),
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


def as_json(settings: dict, workload: Workload, results: list[Result]) -> dict:
    """Everything measured. settings: what was asked for, as plain values."""
    return {
        "settings": settings,
        "machine": machine(workload.device),
        "full_window_chunks": [index + 1 for index in workload.full_window],
        "summary": summary(workload, results),
        "methods": {result.letter: asdict(result) for result in results},
    }


def plot(title: str, workload: Workload, results: list[Result]) -> Image.Image:
    """Seconds by chunk number, and below them peak memory where it was followed; one curve for each result."""
    seconds, memory = {}, {}
    for result in results:
        taken = [result.chunk_seconds(index) for index in range(workload.chunks)]
        seconds[_name(result)] = list(enumerate(taken, start=1))
        memory[_name(result)] = [(number, peak / 2**20) for number, peak in enumerate(result.peak_bytes, start=1)]
    chunk, height = Axis("chunk", whole=True), 440
    panels = [draw(seconds, chunk, Axis("seconds per chunk", from_zero=True), title, height=height)]
    if any(memory.values()):
        panels.append(draw(memory, chunk, Axis("peak memory, MiB", from_zero=True), "", height=height))
    return stack(panels)


def write_plot(path: Path, title: str, workload: Workload, results: list[Result]) -> None:
    """Save `plot` as a PNG file."""
    with replacing(path, what="picture") as file:
        plot(title, workload, results).save(file, format="png")


def _name(result: Result) -> str:
    return f"({result.letter}) {result.title}"
