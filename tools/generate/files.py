"""How generated files are written."""

from __future__ import annotations

import json
from pathlib import Path

from ..comfyui.env import PACK


def as_json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write(path: Path, content: str) -> None:
    """Write a file of the pack, and say so if that changes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")
        print(path.relative_to(PACK))
