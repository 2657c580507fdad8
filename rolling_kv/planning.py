"""What a run will take and whether it fits, told from a checkpoint's names and shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel

from .cache.window import FrameWindow
from .checkpoints.detect import choose_preset
from .checkpoints.dtypes import choose_dtype
from .checkpoints.gguf import gguf_types
from .checkpoints.readers import telling
from .config import CacheConfig, ExecutionConfig, SamplingConfig
from .geometry import Geometry
from .inspection import read_shapes
from .presets import ModelPreset
from .sampling.history import RECOMPUTING
from .sampling.memory import Estimate, estimate, what_fits
from .sampling.state import ChunkRecord


class Outline(NamedTuple):
    """A model that is not loaded. Nothing in it refers to the file.

    transformer: on the meta device.
    preset: its sampling and cache settings.
    dtype: that it will compute in.
    weights: bytes that its weights will take.
    weight_sets: 2 where context passes have weights of their own.
    """

    transformer: WanTransformer3DModel
    preset: ModelPreset
    dtype: torch.dtype
    weights: int
    weight_sets: int


def outline(
    path: str | Path, *, preset: str = "auto", dtype: str = "auto", storage: str = "model", runs_on: str = "cpu"
) -> Outline:
    """What `load_model` would make of a checkpoint. The parameters are those of `load_model`; it raises as that does."""
    path = Path(path)
    with telling(path):
        checkpoint, _, sets, transformer = read_shapes(path)
        chosen = choose_preset(preset, path, checkpoint)
        packings = gguf_types(checkpoint.tensors)
        ExecutionConfig().check(weight_storage=storage, packings=packings)
        computed = choose_dtype(dtype, sets[0], runs_on)
    if packings:
        weights = sum(file.stat().st_size for file in checkpoint.files)
    else:
        small = 1 if storage == "float8" else computed.itemsize
        weights = sum(
            weight.numel() * (small if weight.ndim == 2 and name.startswith("blocks.") else computed.itemsize)
            for tensors in sets
            for name, weight in tensors.items()
        )
    return Outline(transformer, chosen, computed, weights, len(sets))


class Forecast(NamedTuple):
    """What a run will take, in bytes.

    weights: of the model. run: beside them. latents: of the finished video, in CPU memory.
    device, host: altogether on the device, and in CPU memory beside it; a CPU has it all on the device.
    fits: whether there is room for it.
    remedies: what would fit, as phrases; empty where it does fit.
    """

    weights: int
    run: Estimate
    latents: int
    device: int
    host: int
    fits: bool
    remedies: tuple[str, ...]


def forecast(
    model: Outline,
    height: int,
    width: int,
    *,
    sampling: SamplingConfig,
    cache: CacheConfig,
    frames: int,
    batch: int = 1,
    room: int,
    host_room: int | None,
) -> Forecast:
    """What a run with these settings will take.

    height, width: pixels. frames: latent frames of the whole video.
    room: bytes that can be had on the device, weights that are there already included. host_room: likewise in CPU memory
        beside it; None for a CPU.

    Raises ValueError for settings that do not go together.
    """
    sampling.check_cache(cache)
    geometry = Geometry.of(model.transformer)
    latent_height, latent_width = geometry.latent_size(height, width)
    per_frame = batch * geometry.channels * latent_height * latent_width * model.dtype.itemsize

    def taken(cache: CacheConfig, frames: int = frames) -> tuple[Estimate, int, int]:
        run = estimate(
            model.transformer,
            height,
            width,
            sampling=sampling,
            cache=cache,
            dtype=model.dtype,
            batch=batch,
            frames=frames,
            weight_sets=model.weight_sets,
            joint_switch=cache.switch == "joint",
        )
        on_device, beside = model.weights + run.device, run.host + frames * per_frame
        return (run, on_device + beside, 0) if host_room is None else (run, on_device, beside)

    def fits(cache: CacheConfig, frames: int = frames) -> bool:
        _, device, host = taken(cache, frames)
        return device <= room and host <= (host_room or 0)

    run, device, host = taken(cache)
    remedies = () if fits(cache) else tuple(what_fits(fits, sampling, cache, frames))
    return Forecast(model.weights, run, frames * per_frame, device, host, not remedies, remedies)


def last_window(sampling: SamplingConfig, cache: CacheConfig, frames: int) -> FrameWindow:
    """The window while the last chunk of a video is made. frames: latent frames of the video, of whole chunks."""
    window = FrameWindow(cache.limit or frames, cache.sink, cache.held - cache.sink, cache.unlimited)
    open_frames = sampling.chunk if frames >= sampling.chunk else frames
    window.end = frames - open_frames
    window.begin(open_frames)
    return window


def window_after(records: Sequence[ChunkRecord], cache: CacheConfig) -> FrameWindow:
    """The window once a working cache has seen such a log, as `History` brings it there.

    Raises ValueError where it cannot hold a chunk.
    """
    frames = sum(record.frames for record in records)
    window = FrameWindow(cache.limit or max(frames, 1), cache.sink, cache.held - cache.sink, cache.unlimited)
    at = 0
    for record in records:
        if record.switch == "flush" or (record.switch == "cut" and cache.cut_flush):
            window.flush()
        if record.switch in RECOMPUTING:
            window.restart(at, cache.global_sink)
            window.end = at
        if record.switch == "cut" and cache.shot_clean:
            window.drop_to_sink()
        window.place_shot(record.frames)
        window.begin(record.frames)
        window.commit()
        if record.switch == "cut" and cache.shot_sink:
            window.keep_shot(at, record.frames)
        at += record.frames
    return window
