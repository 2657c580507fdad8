"""The oldest versions that requirements.txt allows, as a requirements file: `python -m tools.minima > minima.txt`."""

from __future__ import annotations

from packaging.requirements import Requirement

from .comfyui.env import PACK


def minima() -> list[str]:
    """`name==version` for each line of requirements.txt."""
    lines = [line.partition("#")[0].strip() for line in (PACK / "requirements.txt").read_text().splitlines()]
    return [
        line.replace(">=", "==")
        for line in lines
        if line and [s.operator for s in Requirement(line).specifier] == [">="]
    ]


if __name__ == "__main__":
    print("\n".join(minima()))
