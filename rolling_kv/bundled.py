"""The tiny model that comes with the pack: where it lies, and the size that it makes."""

from __future__ import annotations

from pathlib import Path

from .checkpoints.detect import only_size
from .geometry import WAN_21, Geometry

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "tiny"
"""Where the pack looks for the tiny model."""
BUNDLED_LORA = BUNDLED / "loras" / "stripes.safetensors"
"""A LoRA for it: the background in stripes."""
BUNDLED_SIZE = 64
"""Pixels along each side that it makes."""


def check_model(model: Path) -> None:
    """Raise ValueError unless there is a file or a folder of that name."""
    if model == BUNDLED and not BUNDLED.is_dir():
        raise ValueError(f"the tiny model is not there; make it with: python -m rolling_kv make-tiny {BUNDLED}")
    if not model.is_file() and not model.is_dir():
        raise ValueError(f"{model}: there is no such file or folder")


def default_size(model: Path, geometry: Geometry = WAN_21) -> tuple[int, int]:
    """Height and width in pixels that a model of that geometry makes unless told otherwise."""
    if model.resolve() == BUNDLED:
        return BUNDLED_SIZE, BUNDLED_SIZE
    return only_size(model) or geometry.size
