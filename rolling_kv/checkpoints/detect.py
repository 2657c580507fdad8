"""Which preset a checkpoint was trained for, read from what lies beside it, in it, or in its name."""

from __future__ import annotations

import json
from pathlib import Path

from ..presets import CAUSAL_MARK_PRESET, DEFAULT_PRESET, PRESETS, ModelPreset, preset_for_name
from .readers import Checkpoint, CheckpointError, read_json

PRESET_FILE = "rolling_kv.json"
METADATA_KEY = "rolling_kv"


def choose_preset(preset: str | ModelPreset, path: Path, checkpoint: Checkpoint) -> ModelPreset:
    """The preset asked for; for "auto" the detected one, or self-forcing when nothing tells."""
    if isinstance(preset, ModelPreset):
        return preset
    if preset == "auto":
        return detect_preset(path, checkpoint) or DEFAULT_PRESET
    if preset not in PRESETS:
        raise ValueError(f"preset must be auto or one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]


def detect_preset(path: Path, checkpoint: Checkpoint) -> ModelPreset | None:
    """What the checkpoint says it was trained for; None when it does not say.

    In this order: `rolling_kv.json` in or beside a diffusers folder and the safetensors metadata entry `rolling_kv`,
    both `{"preset": {…}}`; well-known names of the file and its folder; ComfyUI's mark for causal models (frame-wise).
    """
    weights = checkpoint.files[0]
    if path.is_dir():
        for folder in dict.fromkeys((path, weights.parent, weights.parent.parent)):
            if (folder / PRESET_FILE).exists():
                return _parse(PRESET_FILE, read_json(folder / PRESET_FILE))
    if METADATA_KEY in checkpoint.metadata:
        return _parse(f"the metadata entry {METADATA_KEY}", metadata_json(checkpoint, METADATA_KEY))
    for name in (path.name, f"{path.absolute().parent.name}/{path.name}"):
        if preset := preset_for_name(name):
            return preset
    if transformer_metadata(checkpoint).get("causal_ar"):
        return CAUSAL_MARK_PRESET
    return None


def _parse(source: str, content: dict) -> ModelPreset:
    try:
        return ModelPreset.from_dict(content["preset"])
    except KeyError:
        raise CheckpointError(f'{source} has no entry "preset".') from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the preset in {source} is not usable: {error}") from error


def transformer_metadata(checkpoint: Checkpoint) -> dict:
    """The settings that ComfyUI keeps in the safetensors metadata, `config` → `transformer`; {} without them."""
    values = metadata_json(checkpoint, "config").get("transformer", {})
    return values if isinstance(values, dict) else {}


def metadata_json(checkpoint: Checkpoint, key: str) -> dict:
    """The JSON object in a metadata entry, {} when it is absent or something else: anyone may write metadata."""
    try:
        content = json.loads(checkpoint.metadata.get(key, "{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
