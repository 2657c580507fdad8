"""Which preset a checkpoint was trained for, read from what lies beside it, in it, or in its name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..presets import (
    CAUSAL_MARK_PRESET,
    CONTEXT_WEIGHTS_FAMILY,
    DEFAULT_PRESET,
    DEFAULT_PRESETS,
    PRESETS,
    ModelPreset,
    preset_for_name,
)
from .names import latent_channels, split_context
from .readers import Checkpoint, CheckpointError, read_json

PRESET_FILE = "rolling_kv.json"
ONLY_SIZE = "only_size"
METADATA_KEY = "rolling_kv"
_CHOOSE = "Choose the preset that it was trained for, if it is another"
_NOT_CAUSAL = (  # names of files that people have, and what is wrong with them here; the first that matches
    (
        r"^(?!.*caus).*(wan.?(2[._-]?[12]|video|[ti]2v)|[ti]2v.?(1[._]3|14|5)b|vace)",
        "by its name this is an ordinary Wan model, in which every frame was trained to see all others: it is not "
        "causal, and its videos will fall apart here",
    ),
    (
        r"(^|[/_.-])(ode|ode.?init|teacher|undistilled|ar.?diffusion)([/_.-]|$)",
        "by its name this is a model from before its distillation, which needs many steps with guidance",
    ),
)


def choose_preset(preset: str | ModelPreset, path: Path, checkpoint: Checkpoint) -> ModelPreset:
    """The preset asked for; for "auto" the detected one, or `assumed_preset` when nothing tells."""
    if isinstance(preset, ModelPreset):
        return preset
    if preset == "auto":
        return detect_preset(path, checkpoint) or assumed_preset(checkpoint)
    if preset not in PRESETS:
        raise ValueError(f"preset must be auto or one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]


def detect_preset(path: Path, checkpoint: Checkpoint) -> ModelPreset | None:
    """What the checkpoint says it was trained for; None when it does not say.

    In this order: `rolling_kv.json` in or beside a diffusers folder and the safetensors metadata entry `rolling_kv`,
    both `{"preset": {…}}`; a second set of weights, for context passes; well-known names of the file and its folders;
    ComfyUI's mark for causal models (frame-wise).
    """
    if file := own_notes(path):
        return _parse(PRESET_FILE, read_json(file))
    if METADATA_KEY in checkpoint.metadata:
        return _parse(f"the metadata entry {METADATA_KEY}", metadata_json(checkpoint, METADATA_KEY))
    parts = path.absolute().parts[-3:]
    if split_context(checkpoint.tensors)[1]:
        return preset_for_name("/".join((CONTEXT_WEIGHTS_FAMILY, *parts)))
    for start in range(len(parts) - 1, -1, -1):  # what is nearest to the weights knows best
        if preset := preset_for_name("/".join(parts[start:])):
            return preset
    if transformer_metadata(checkpoint).get("causal_ar"):
        return CAUSAL_MARK_PRESET
    return None


def only_size(path: Path) -> tuple[int, int] | None:
    """Height and width in pixels of the only videos that a model makes, as its `own_notes` say: `"only_size": [64, 64]`.
    None where it says nothing, or nothing that can be read: a model that is told its preset needs no such file.
    """
    try:
        size = read_json(file).get(ONLY_SIZE) if (file := own_notes(path)) else None
    except CheckpointError:
        return None
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    return None


def own_notes(path: Path) -> Path | None:
    """The `rolling_kv.json` of the diffusers folder `path`, or of the one whose transformer is in `path`; None without one."""
    here, name = path.absolute(), "transformer"
    places = (here, here.parent) if here.name == name else (here, here / name)
    return next((place / PRESET_FILE for place in places if (place / PRESET_FILE).is_file()), None)


def assumed_preset(checkpoint: Checkpoint) -> ModelPreset:
    """What a checkpoint is taken for that does not tell: the first family of models with such latents."""
    return DEFAULT_PRESETS.get(latent_channels(checkpoint.tensors) or 0, DEFAULT_PRESET)


def assumption(path: Path, checkpoint: Checkpoint) -> str:
    """What is assumed of a checkpoint that does not tell whether it is causal, and what to do; empty where it tells."""
    if detect_preset(path, checkpoint) is not None:
        return ""
    name = f"{path.absolute().parent.name}/{path.name}" if path.is_file() else path.absolute().name
    reason = next((reason for pattern, reason in _NOT_CAUSAL if re.search(pattern, name, re.IGNORECASE)), None)
    reason = reason or "nothing in the file or its name tells which causal model this is"
    assumed = assumed_preset(checkpoint)
    return f"{reason}. It is treated as {assumed.name} ({assumed.trained_for()}). {_CHOOSE}."


def _parse(source: str, content: dict) -> ModelPreset:
    try:
        return ModelPreset.from_dict(content["preset"])
    except KeyError:
        raise CheckpointError(f'{source} has no entry "preset".') from None
    except ValueError as error:
        raise CheckpointError(f"the preset in {source} is not usable: {error}.") from error


def transformer_metadata(checkpoint: Checkpoint) -> dict:
    """The settings that ComfyUI keeps in the safetensors metadata, `config` → `transformer`; {} without them."""
    values = metadata_json(checkpoint, "config").get("transformer", {})
    return values if isinstance(values, dict) else {}


def metadata_json(checkpoint: Checkpoint, key: str) -> dict:
    """The JSON object in a metadata entry, {} when it is absent or something else: anyone may write metadata."""
    try:
        content = json.loads(checkpoint.metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
