"""Which preset a checkpoint was trained for, read from what lies beside it, in it, or in its name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .config import PRESETS, ModelPreset
from .files import Checkpoint, CheckpointError, read_json

PRESET_FILE = "rolling_kv.json"
METADATA_KEY = "rolling_kv"

_NAMES = (  # of the file, else of its folder and itself: some releases differ in nothing but the folder
    (r"chunk.?wise.*ar.?diffusion", "causal-multistep"),  # Causal-Forcing's model before its distillation
    (r"causal.?forcing.?(\+\+|pp|plus).*2.?step", "causal-forcing++-2-step"),
    (r"causal.?forcing.?(\+\+|pp|plus).*1.?step", "causal-forcing++-1-step"),
    (r"causal.?forcing.*frame.?wise|frame.?wise.*causal.?forcing", "causal-forcing-framewise"),
    (r"causal.?forcing.*chunk.?wise|chunk.?wise.*causal.?forcing", "causal-forcing-chunkwise"),
    (r"long.?live", "longlive"),
    (r"krea.?real.?time", "krea-realtime"),
    (r"reward.?forcing", "reward-forcing"),
    (r"self.?forcing|sfwan", "self-forcing"),
)


def choose_preset(preset: str | ModelPreset, path: Path, checkpoint: Checkpoint) -> ModelPreset:
    """The preset asked for; for "auto" the detected one, or self-forcing when nothing tells."""
    if isinstance(preset, ModelPreset):
        return preset
    if preset == "auto":
        return detect_preset(path, checkpoint) or PRESETS["self-forcing"]
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
        for pattern, preset in _NAMES:
            if re.search(pattern, name, re.IGNORECASE):
                return PRESETS[preset]
    if transformer_metadata(checkpoint).get("causal_ar"):
        return PRESETS["causal-forcing-framewise"]
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
