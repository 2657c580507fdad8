"""What all benchmarks say alike: the machine, numbers, sizes, tables for people, JSON for programs."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from ..atomic import replacing
from ..config import CacheConfig, SamplingConfig

VERSIONS = ("diffusers", "transformers", "triton", "sageattention", "flash_attn", "comfy_kitchen")
"""Packages whose version decides what is measured, where they are installed."""


class BenchError(ValueError):
    """What was measured is of no use: it fails, or does other work than what it is compared with."""


def full_window(chunks: int, sampling: SamplingConfig, cache: CacheConfig, spare: int = 0) -> list[int]:
    """Numbers (from 0) of the chunks whose passes all see a full window; the last chunk alone if there are none.

    spare: chunks with a full window to leave out before.
    """
    full = [i for i in range(chunks) if cache.limit is not None and (i - spare) * sampling.chunk >= cache.limit]
    return full or [chunks - 1]


def span(numbers: Sequence[int]) -> str:
    """Chunks by their numbers (from 0), as people count them."""
    first, last = numbers[0] + 1, numbers[-1] + 1
    return f"chunks {first} to {last}" if len(numbers) > 1 else f"chunk {first}"


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on, and with what."""
    known = {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known |= {
            "gpu": card.name,
            "gpu_bytes": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "driver": _driver(),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": torch.backends.cudnn.version() or 0,
        }
    known |= {package: metadata.version(package) for package in VERSIONS if find_spec(package)}
    return known | {"python": platform.python_version(), "system": platform.system(), "revision": revision()}


def revision(root: Path = Path(__file__).parents[2]) -> str:
    """The git revision of a checkout, empty where there is none. What was changed and not committed does not show."""
    try:
        git = root / ".git"
        if git.is_file():  # a worktree
            git = Path(root, git.read_text(encoding="utf-8").removeprefix("gitdir:").strip())
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name, common = head.removeprefix("ref: "), git / "commondir"
        shared = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        if (shared / name).is_file():
            return (shared / name).read_text(encoding="utf-8").strip()
        packed = (shared / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
    except OSError:
        return ""


def _driver() -> str:
    """The version of NVIDIA's driver; where the system does not tell it, that of the newest CUDA that it knows."""
    told = Path("/proc/driver/nvidia/version")
    if told.is_file():
        found = re.search(r"\d+\.\d+(\.\d+)*", told.read_text(encoding="utf-8", errors="replace"))
        return found[0] if found else ""
    newest = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"CUDA {newest // 1000}.{newest % 1000 // 10}" if newest else ""


def hardware(device: torch.device) -> str:
    """The machine in a line."""
    here = machine(device)
    threads = here["threads"]
    cpu = f"{here['cpu']}, {threads} thread{'' if threads == 1 else 's'}"
    return f"{here.get('gpu', cpu)}, torch {here['torch']}"


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def ratios(seconds: Sequence[Sequence[float]], first: Sequence[Sequence[float]]) -> dict[str, float]:
    """How long one way takes beside the first: medians of the same turn's ratios, and between what they lie.

    seconds, first: wall-clock seconds of each turn, and those of the processor.
    """
    wall, cpu = ([own / other for own, other in zip(*pair)] for pair in zip(seconds, first))
    return {
        "seconds": median(seconds[0]),
        "times_the_first": median(wall),
        "least": min(wall),
        "most": max(wall),
        "cpu_times_the_first": median(cpu),
    }
