"""How generated files are written."""

from __future__ import annotations

import json
from pathlib import Path

from ..comfyui.env import PACK


def as_json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write(path: Path, content: str) -> bool:
    """Write a file of the pack; says so, and returns True, if that changes it."""
    if path.is_file() and path.read_text(encoding="utf-8") == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    print(path.relative_to(PACK))
    return True
