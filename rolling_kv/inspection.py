"""What a checkpoint is, told from names and shapes alone, and what its cache will cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .bundled import default_size
from .cache.sizes import CacheShape
from .checkpoints.detect import assumed_preset, assumption, detect_preset
from .checkpoints.dtypes import dtype_name, stored_dtypes
from .checkpoints.gguf import gguf_types
from .checkpoints.names import split_context
from .checkpoints.readers import Checkpoint, open_checkpoint, telling
from .checkpoints.transformer import empty_transformer, prepare, settings_of, transformer_path
from .geometry import Geometry
from .presets import ModelPreset
from .sampling.memory import Estimate, estimate


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    layout: naming, wrapper and prefix, for people.
    file_bytes: of all weight files together.
    dtypes: of the stored weights, the one with the most values first; the packings of a GGUF file before the rest.
    config: layers, dim, heads, ffn.
    parameters: of both sets of weights, where there is one for context passes too.
    preset: name of the detected preset, None where neither the file nor its name tells.
    note: what is then assumed, and what to do; empty otherwise.
    geometry: how pixels, latents and seconds follow from each other.
    kv_bytes_per_frame: keys and values of one latent frame in bfloat16 at `height` x `width` pixels.
    settings: the preset that a load chooses on its own.
    run: what a run with these settings takes beside the weights, in bfloat16 at that size.
    """

    path: Path
    layout: str
    file_bytes: int
    dtypes: tuple[str, ...]
    config: dict[str, int]
    parameters: int
    preset: str | None
    note: str
    height: int
    width: int
    kv_bytes_per_frame: int
    geometry: Geometry
    settings: ModelPreset
    run: Estimate


class Shapes(NamedTuple):
    """What the names and shapes in a checkpoint tell.

    checkpoint: as it was opened; its tensors may be mapped from the file.
    naming: how its tensors are named, for people.
    sets: the weights by diffusers' names, without scales; a second set where there is one for context passes.
    transformer: the model that they make, on the meta device.
    """

    checkpoint: Checkpoint
    naming: str
    sets: tuple[dict[str, torch.Tensor], ...]
    transformer: Any


def read_shapes(path: Path) -> Shapes:
    """Read names and shapes alone. Raises CheckpointError as `load_model` does."""
    with telling(path):
        checkpoint = open_checkpoint(transformer_path(path), values=False)
        own, context = split_context(checkpoint.tensors)
        sets = [prepare(tensors, settings_of(checkpoint)) for tensors in ((own, context) if context else (own,))]
        weights, _, config, naming = sets[0]
        return Shapes(checkpoint, naming, tuple(weights for weights, *_ in sets), empty_transformer(weights, config))


def inspect_checkpoint(path: str | Path, height: int | None = None, width: int | None = None) -> CheckpointInfo:
    """Tell what a checkpoint is, from names and shapes alone. Raises CheckpointError as `load_model` does.

    height, width: pixels, by default those that such models were trained at, as `default_size` tells.
    """
    path = Path(path)
    checkpoint, naming, (weights, *context), transformer = read_shapes(path)
    with telling(path):
        preset, note = detect_preset(path, checkpoint), assumption(path, checkpoint)
    settings = preset or assumed_preset(checkpoint)
    packings, geometry = gguf_types(checkpoint.tensors), Geometry.of(transformer)
    usual = default_size(path, geometry)
    height, width = height or usual[0], width or usual[1]
    shape = CacheShape.of(transformer, 1, *geometry.latent_size(height, width), torch.bfloat16)
    return CheckpointInfo(
        path=path,
        layout=", ".join(
            filter(
                None,
                (
                    naming,
                    checkpoint.wrapper and f"wrapper {checkpoint.wrapper}",
                    "a second set of weights for context passes" if context else "",
                ),
            )
        ),
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        dtypes=(*packings, *map(dtype_name, stored_dtypes(checkpoint.tensors if packings else weights))),
        config={
            "layers": shape.layers,
            "dim": shape.heads * shape.head_dim,
            "heads": shape.heads,
            "ffn": transformer.config.ffn_dim,
        },
        parameters=sum(weight.numel() for tensors in (weights, *context) for weight in tensors.values()),
        preset=preset and preset.name,
        note=note,
        height=height,
        width=width,
        kv_bytes_per_frame=shape.bytes_per_frame(),
        geometry=geometry,
        settings=settings,
        run=estimate(
            transformer,
            height,
            width,
            sampling=settings.sampling,
            cache=settings.cache,
            dtype=torch.bfloat16,
            frames=settings.sampling.chunk,
            weight_sets=1 + len(context),
        ),
    )
