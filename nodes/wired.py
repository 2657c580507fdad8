"""From what a page says about a graph to settings: a model that need not be loaded, its cache, and the run to come.

A page sends the inputs of nodes as an API prompt has them, without links:
    {"model": {"load": inputs of Load Causal Video Model, "attach": [inputs of each Attach Rolling Cache behind it]},
     "sampler": inputs of Sample Video or Stream Video}
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as mm
from comfy_api.latest import io

from ..rolling_kv.checkpoints.transformer import transformer_path
from ..rolling_kv.config import SPEEDS, WEIGHT_STORAGES, CacheConfig, ExecutionConfig, SamplingConfig, check_choice
from ..rolling_kv.messages import shown
from ..rolling_kv.planning import Outline, outline
from ..rolling_kv.presets import PRESETS
from . import inputs, model_files
from .guard import checked_value

MOST_ATTACHED = 16
SECONDS = 5.0
"""How long a run is taken to be whose length is not known."""


class Wired(NamedTuple):
    """A model as the nodes before a sampler make it. LoRAs change nothing here and are left out.

    execution: what decides how much memory its passes take.
    """

    outline: Outline
    sampling: SamplingConfig
    cache: CacheConfig
    execution: ExecutionConfig


class Run(NamedTuple):
    """What a sampler is to make. height, width: pixels. seconds: 0 for a run until somebody stops it."""

    height: int
    width: int
    seconds: float
    chunks: int | None
    guidance: dict | None
    batch: int


def wired(said: object) -> Wired:
    """The model of such a request. Raises ValueError for what the nodes would refuse."""
    said = _object("model", said)
    load = _object("model.load", said.get("load"))
    preset, dtype, storage = load.get("preset", "auto"), load.get("dtype", "auto"), load.get("storage", "model")
    check_choice("preset", preset, ("auto", *PRESETS))
    check_choice("storage", storage, WEIGHT_STORAGES)
    checked_value(inputs.dtype(""), dtype)
    path = model_files.get(model_files.MODEL, load.get("model_name"))
    offload, compiled = (
        bool(checked_value(io.Boolean.Input(name), load.get(name, False))) for name in ("offload", "compile")
    )
    speed = load.get("speed", "standard")
    check_choice("speed", speed, SPEEDS)
    made = _outline(path, _stamp(path), preset, dtype, storage, str(mm.get_torch_device()), offload)
    cache, attached = made.preset.cache, said.get("attach", [])
    if not isinstance(attached, list) or len(attached) > MOST_ATTACHED:
        raise ValueError(f"model.attach must be a list of at most {MOST_ATTACHED} objects, got {shown(attached)}")
    for number, given in enumerate(attached):
        given = _object(f"model.attach {number}", given)
        cache = inputs.cache_of(cache, **_values(inputs.cache_rules(), given))
    made.preset.sampling.check_cache(cache)
    return Wired(made, made.preset.sampling, cache, ExecutionConfig(compile=compiled, fast=speed == "fast"))


def run_of(said: object) -> Run:
    """The run of such a request; one of the usual size where there is no sampler. Raises ValueError likewise."""
    said = {} if said is None else _object("sampler", said)
    numbers = io.Float.Input("length", min=0.0, max=86400.0), io.Float.Input("seconds", min=0.0, max=86400.0)
    asked = [inputs.side("width", ""), inputs.side("height", ""), inputs.guidance(advanced=True), inputs.batch_size()]
    values = _values([*asked, *numbers], said)
    unit = said.get("length_unit", "seconds")
    chunks = max(round(values["length"]), 1) if unit == "chunks" and "length" in values else None
    seconds = values.get("seconds", values.get("length", SECONDS) if unit == "seconds" else SECONDS)
    size = values.get("height", inputs.SIDES["height"]), values.get("width", inputs.SIDES["width"])
    return Run(*size, float(seconds), chunks, values.get("guidance"), values.get("batch_size") or 1)


def _values(asked: list[io.Input], said: dict) -> dict[str, Any]:
    """The values of those inputs that are given, as a node gets them. Raises ValueError as a node does."""
    return {given.id: checked_value(given, _nested(given, said)) for given in asked if said.get(given.id) is not None}


def _nested(given: io.Input, said: dict) -> Any:
    """An input's value. A choice comes with the inputs that it brings, each under `name.` and its own name."""
    value, before = said[given.id], f"{given.id}."
    if not isinstance(given, io.DynamicCombo.Input):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{given.id} must be a choice, got {shown(value)}")
    brought = {name.removeprefix(before): part for name, part in said.items() if name.startswith(before)}
    return {**brought, given.id: value}


def _object(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {shown(value)}")
    return value


def _stamp(path: Path) -> tuple:
    """What changes whenever the files of a model do."""
    folder = transformer_path(path)
    files = [*path.glob("*.json"), *folder.iterdir()] if path.is_dir() else [path]
    return tuple(sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=8)
def _outline(path: Path, stamp: tuple, preset: str, dtype: str, storage: str, runs_on: str, offload: bool) -> Outline:
    """Kept, as a page asks anew whenever one of its settings has changed."""
    return outline(path, preset=preset, dtype=dtype, storage=storage, runs_on=runs_on, offload=offload)
