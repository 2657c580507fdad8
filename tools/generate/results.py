"""The section of docs/benchmarks.md on GPUs: the tables of all reports in docs/results/, each with its machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rolling_kv.bench.random_model import SIZES
from rolling_kv.bench.report.cli import table
from rolling_kv.bench.report.parts import parts_of
from rolling_kv.bench.report.run import Outcome

from ..comfyui.env import PACK
from .files import write

PAGE = PACK / "docs" / "benchmarks.md"
RESULTS = PACK / "docs" / "results"
HEADING = "### On GPUs"
NONE = "No report has come yet: [please send yours](results/README.md)."
BUILDS = ("driver", "cuda", "torch", "triton", "sageattention", "flash_attn")
"""What of a machine is told beside its names, where the report has it."""


def section(folder: Path = RESULTS) -> str:
    """The reports in a folder, in the order of their names, as Markdown."""
    files = sorted(folder.glob("*/report.json"))
    told = [_told(file.parent.name, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return "\n\n".join([HEADING, *(told or [NONE])])


def _told(name: str, report: dict) -> str:
    machine, size = report["machine"], report["size"]
    kind = "cuda" if "gpu" in machine else "cpu"
    known = {part.name: part for part in parts_of(size, kind, SIZES[size].window, report["quick"])}
    outcomes = [Outcome(**part) for part in report["parts"] if part["name"] in known]
    builds = ", ".join(f"{build} {machine[build]}" for build in BUILDS if machine.get(build))
    return "\n".join(
        [
            f"**{machine.get('gpu', machine['cpu'])}**, random weights of the size {size}; {builds}; {machine['system']}; revision "
            f"{machine['revision'][:9] or 'unknown'} ([all figures](results/{name}/report.json)).",
            "",
            *table([known[outcome.name] for outcome in outcomes], outcomes),
        ]
    )


def generated() -> str:
    """The page with its section as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(rf"^{HEADING}\n.*?(?=\n\n##)", lambda _: section(), text, count=1, flags=re.M | re.S)


def generate() -> None:
    write(PAGE, generated())
