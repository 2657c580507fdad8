"""What a report is made of, in the order of worth: whoever has little time has the beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..figures import size as sized

Figures = dict[str, Any]
"""What a benchmark writes to its JSON file."""


class Part(NamedTuple):
    """One benchmark.

    name: of its files. command: behind `python -m rolling_kv bench`. limit: seconds after which it is ended.
    headline: what counts of its figures, in a line.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    headline: Callable[[Figures], str]


def parts_of(size: str, device: str, window: int, quick: bool = False) -> list[Part]:
    """The parts for a random model of that size with that window.

    quick: as few turns as show that everything runs, for as long as that takes, and the VAE at a small width. What is large is
        for cards alone, and never quick.
    """
    few = ("--repeats", "1") if quick else ()
    model, picture = ("--size", size), ("--vae-size", "tiny") if quick else ()
    chunks = "--chunks", "1" if quick else "8"

    def passes(name: str, *options: str, of: tuple[str, ...] = model, limit: float = 60) -> Part:
        return Part(name, ("passes", *of, *options, *few), limit, _pass)

    large = device == "cuda" and not quick
    parts = [
        Part("kernels", ("kernels", *model, *few), 60, _kernels),
        passes("pass"),
        Part("methods", (*model, "--methods", "ae", "--chunks", "2" if quick else "10", "--no-memory"), 90, _methods),
        Part("cases", ("cases", *(("--families", "self-forcing") if quick else ())), 90, _cases),
        Part("decode", ("decode", *picture, *few), 60, _decode),
        Part("pipeline", ("pipeline", *model, *picture, *chunks), 90, _pipeline),
        Part("pipeline_tiny", ("pipeline", *model, "--tiny-decoder", *chunks), 60, _pipeline),
        passes("compiled", "--compile", limit=150),
    ]
    if device == "cuda":
        nvenc = "--tiny-decoder", "--encoder", "h264_nvenc"
        parts.insert(-1, Part("pipeline_nvenc", ("pipeline", *model, *nvenc, *chunks), 60, _pipeline))
        parts += [
            passes("graphs", "--cuda-graphs"),
            passes("fast", "--fast"),
            passes("fast_graphs", "--fast", "--cuda-graphs"),
        ]
    parts += [
        passes("cache_int8", "--cache-storage", "int8"),
        passes("cache_float8", "--cache-storage", "float8"),
        passes("weights_float8", "--weight-storage", "float8"),
        *(passes(f"window_{frames}", "--window", str(frames)) for frames in (12, 6) if frames < window),
    ]
    if large:
        fewer = "--weight-storage", "float8", "--cache-storage", "int8"
        of = "--size", "14B", "--window", "6"
        parts += [passes("14B", of=of, limit=90), passes("14B_float8", *fewer, of=of, limit=90)]
    parts += [
        passes("offloaded", "--offload-cache"),
        passes("weights_offloaded", "--offload-weights"),
        passes("framewise", "--chunk", "1"),
        *([passes("720p", "--height", "720", "--width", "1280", "--window", "6")] if large else []),
    ]
    return [part._replace(limit=10 * part.limit) for part in parts] if quick else parts  # on whatever machine there is


def _pass(figures: Figures) -> str:
    found = figures["result"]
    kinds = (found["kernels"] or {}).get("kinds", {})
    whole = sum(kinds.values())
    shares = ", ".join(f"{kind} {took / whole:.0%}" for kind, took in list(kinds.items())[:3])
    times = f"step {found['step'] * 1e3:.1f} ms, context pass {found['context'] * 1e3:.1f} ms"
    bytes_said = f"{sized(found['peak'])} beside the weights, announced {found['announced_times_real']:.2f} times that"
    return "; ".join(filter(None, [times, shares, bytes_said]))


def _kernels(figures: Figures) -> str:
    frames = max(row["frames"] for row in figures["attention"])
    full = [row for row in figures["attention"] if row["frames"] == frames and not row["error"]]
    attention = ", ".join(f"{row['backend']} {row['tflops']:.3g}" for row in full)
    products = ", ".join(f"{row['tflops']:.3g}" for row in figures["products"])
    return f"TFLOP/s of attention over {frames} frames: {attention}; of the matrix products: {products}"


def _methods(figures: Figures) -> str:
    ours, floor = figures["summary"]["a"], figures["summary"]["e"]
    return f"{ours['seconds'] * 1e3:.0f} ms a chunk, the floor {floor['seconds'] * 1e3:.0f} ms, {ours['share_of_floor']:.3f} of it"


def _cases(figures: Figures) -> str:
    worst = max(figures["cases"], key=lambda case: case["difference"])
    return f"{len(figures['cases'])} cases, at most {worst['difference']:.1e} off ({worst['name']})"


def _decode(figures: Figures) -> str:
    ways = figures["ways"]
    times = ", ".join(f"{row['way']} {row['seconds'] * 1e3:.1f}" for row in ways)
    announced = ways[0]["announced"] / ways[0]["peak"]
    return f"ms a latent frame: {times}; announced {announced:.2f} times what was in use"


def _pipeline(figures: Figures) -> str:
    shares = ", ".join(f"{part} {share:.0%}" for part, share in figures["shares"].items())
    return (
        f"{figures['frames_per_second']:.1f} frames a second with {figures['encoder']}, the first after "
        f"{figures['first_frame']:.2f} s; alone: {shares}"
    )


def command_line(command: Sequence[str]) -> str:
    """A part as a person would run it."""
    return " ".join(["python -m rolling_kv bench", *command])
