"""What a run will take and whether it fits, told from a checkpoint's names and shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel

from .cache.window import FrameWindow
from .checkpoints.detect import choose_preset
from .checkpoints.dtypes import choose_dtype
from .checkpoints.float8 import store_float8
from .checkpoints.gguf import gguf_types
from .checkpoints.readers import telling
from .config import CacheConfig, ExecutionConfig, SamplingConfig
from .geometry import Geometry
from .inspection import read_shapes
from .presets import ModelPreset
from .sampling.history import RECOMPUTING
from .sampling.memory import OFFLOAD_WEIGHTS, STANDARD_SPEED, Estimate, estimate, what_fits
from .sampling.state import ChunkRecord
from .wan.offloaded import PLACES
from .wan.products import bytes_of


class Outline(NamedTuple):
    """A model that is not loaded. Nothing in it refers to the file.

    transformer: on the meta device, with the layers that it will have, in its dtype; those of a packed one are plain.
    preset: its sampling and cache settings.
    dtype: that it will compute in.
    weights: bytes that its weights will take on the device.
    weight_sets: 2 where context passes have weights of their own.
    packed: whether they are those of a GGUF file, which keeps its own packing.
    host_weights: bytes of those that lie in CPU memory beside the device.
    """

    transformer: WanTransformer3DModel
    preset: ModelPreset
    dtype: torch.dtype
    weights: int
    weight_sets: int
    packed: bool = False
    host_weights: int = 0

    @property
    def products(self) -> int:
        """Bytes of one set of its weights in float8 beside the model's own, for fast passes on a device that multiplies so."""
        return 0 if self.packed else bytes_of(self.transformer, offloaded=bool(self.host_weights))


def outline(
    path: str | Path,
    *,
    preset: str = "auto",
    dtype: str = "auto",
    storage: str = "model",
    runs_on: str = "cpu",
    offload: bool = False,
) -> Outline:
    """What `load_model` would make of a checkpoint. The parameters are those of `load_model`; it raises as that does.

    offload: keep the weights of the blocks in CPU memory, as `wan.offloaded` does.
    """
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
        weights = sum(weight_bytes(tensors, computed, storage) for tensors in sets)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(computed)
    if storage == "float8":
        store_float8(transformer)
    made = Outline(transformer, chosen, computed, weights, len(sets), bool(packings))
    return offloaded(made) if offload else made


def offloaded(made: Outline) -> Outline:
    """The same model with the weights of its blocks in CPU memory, and only those at work on the device."""
    everything = sum(weight.numel() for weight in made.transformer.parameters())
    outside = everything - sum(weight.numel() for weight in made.transformer.blocks.parameters())
    outside *= made.weight_sets * made.dtype.itemsize
    inside = max(made.weights - outside, 0)
    here = PLACES * inside // len(made.transformer.blocks)
    return made._replace(weights=outside + here, host_weights=inside)


def weight_bytes(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, storage: str) -> int:
    """Bytes of weights by diffusers' names, which compute in `dtype`. storage: one of `WEIGHT_STORAGES`."""
    small = 1 if storage == "float8" else dtype.itemsize
    return sum(
        weight.numel() * (small if weight.ndim == 2 and name.startswith("blocks.") else dtype.itemsize)
        for name, weight in tensors.items()
    )


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
    fast: bool = False,
) -> Forecast:
    """What a run with these settings will take.

    height, width: pixels. frames: latent frames of the whole video.
    fast: whether its products are in float8 where weights can be, see `wan.fast.fast_for`.
    room: bytes that can be had on the device, weights that are there already included. host_room: likewise in CPU memory
        beside it; None for a CPU.

    Raises ValueError for settings that do not go together.
    """
    sampling.check_cache(cache)
    geometry = Geometry.of(model.transformer)
    latent_height, latent_width = geometry.latent_size(height, width)
    per_frame = batch * geometry.channels * latent_height * latent_width * model.dtype.itemsize

    def taken(
        cache: CacheConfig, frames: int = frames, model: Outline = model, fast: bool = fast
    ) -> tuple[Estimate, int, int]:
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
            products=model.products if fast else 0,
        )
        on_device, beside = model.weights + run.device, model.host_weights + run.host + frames * per_frame
        return (run, on_device + beside, 0) if host_room is None else (run, on_device, beside)

    def fits(*changed, **others) -> bool:
        _, device, host = taken(*changed, **others)
        return device <= room and host <= (host_room or 0)

    run, device, host = taken(cache)
    remedies = ()
    if not fits(cache):
        changes = [STANDARD_SPEED] if fits(cache, fast=False) else []
        if host_room is not None and not model.host_weights and fits(cache, model=offloaded(model)):
            changes.append(OFFLOAD_WEIGHTS)
        remedies = tuple(what_fits(fits, sampling, cache, frames, changes))
    return Forecast(model.weights, run, frames * per_frame, device, host, not remedies, remedies)


TEXT_ENCODER = {"16 bit": 12_470_000_000, "float8": 7_840_000_000}
"""Bytes that UMT5-XXL takes on a card while it encodes a prompt, alone there, by how its weights are kept."""
OVERHEAD = round(0.6 * 2**30)
"""Bytes of a card that a CUDA context and the workspaces of its libraries take, about."""
WAYS = (
    ("model", "model", False),
    ("model", "int8", False),
    ("float8", "model", False),
    ("float8", "int8", False),
    ("float8", "int8", True),
    ("float8, offloaded", "int8", False),
    ("float8, offloaded", "int8", True),
    ("model, offloaded", "int8", False),
    ("model, offloaded", "int8", True),
)
"""How the weights are kept, the storage of the cache, and whether that is offloaded: each takes less of the card, and costs
more. The last two are for weights that have no other storage."""
SHORT_WINDOW = 6
"""Latent frames; the shortest window that a family was trained with."""


class Choice(NamedTuple):
    """A way to run a model on a card.

    weights: how they are kept, of those in `WAYS`. cache: its settings. known: what that takes.
    fast: bytes of the card that fast passes take more.
    device: bytes of the card, with `OVERHEAD`.
    """

    weights: str
    cache: CacheConfig
    known: Forecast
    fast: int

    @property
    def device(self) -> int:
        return self.known.device + OVERHEAD

    def options(self) -> str:
        """As options of the command line, which say also what is the default."""
        storage, _, elsewhere = self.weights.partition(", ")
        weights = storage + (" --offload-weights" if elsewhere else "")
        offload = " --offload-cache" if self.cache.offload else ""
        return f"--window {self.cache.window} --weight-storage {weights} --cache-storage {self.cache.storage}{offload}"


def kept_in_ways(model: dict[str, Outline]) -> dict[str, Outline]:
    """Outlines of a model by how its weights are kept. model: those that are whole on the device, the smallest last."""
    smallest = list(model)[-1]
    return model | {f"{smallest}, offloaded": offloaded(model[smallest])}


CHOICE_HEAD = [
    "window",
    "weights",
    "cache",
    "weights, GiB",
    "beside them, GiB",
    "with CUDA's own, GiB",
    "fast takes more, GiB",
    "CPU memory, GiB",
]


def told_choice(choice: Choice) -> list[str]:
    """A row for people, under `CHOICE_HEAD`."""
    cache, known = choice.cache, choice.known
    sizes = known.weights, known.run.device, choice.device, choice.fast, known.host
    return [
        str(cache.window), choice.weights, cache.storage + (", offloaded" if cache.offload else ""),
        *(f"{size / 2**30:.2f}" for size in sizes),
    ]  # fmt: skip


def choices(model: Mapping[str, Outline], height: int, width: int, card: int) -> list[Choice]:
    """Ways to run a model on a card of so many bytes, the one that changes least first; `known.fits` says which fit.

    model: by how its weights are kept, "model" among them. height, width: pixels.
    """
    preset = model["model"].preset
    sampling = preset.sampling
    limit = preset.cache.limit
    windows = [preset.cache]
    if limit is None or limit > SHORT_WINDOW:
        shorter = replace(preset.cache, window=SHORT_WINDOW)
        windows += [shorter] if goes(sampling, shorter) else []
    seconds = Geometry.of(model["model"].transformer).seconds
    frames = next(count for chunks in range(1, 1000) if seconds(count := sampling.frames_of(chunks)) >= CHOICE_SECONDS)
    found = []
    for window in windows:
        for weights, storage, offload in WAYS:
            if weights in model:
                cache = replace(window, storage=storage, offload=offload)
                known = forecast(
                    model[weights], height, width, sampling=sampling, cache=cache, frames=frames,
                    room=card - OVERHEAD, host_room=ANY_ROOM,
                )  # fmt: skip
                found.append(Choice(weights, cache, known, model[weights].weight_sets * model[weights].products))
    return found


CHOICE_SECONDS = 5.0
"""Of the video that ways to run a model are told for; beyond the window only CPU memory depends on it."""
ANY_ROOM = 2**60
"""Bytes that no machine has: nothing is asked of its CPU memory."""


def goes(sampling: SamplingConfig, cache: CacheConfig) -> bool:
    """Whether these settings go together."""
    try:
        sampling.check_cache(cache)
    except ValueError:
        return False
    return True


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
