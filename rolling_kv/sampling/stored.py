"""What is believed of a state on disk, and only after it is checked; shared by its file and its journal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import torch

from ..config import SWITCHES
from ..geometry import GEOMETRIES
from ..messages import MESSAGE_LENGTH, listed, printable, shortened, shown
from .state import CacheState, ChunkRecord

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StateFileError(ValueError):
    """A file that is no cache state, or not one that can be used here. The message is one line, fit for every log."""

    def __init__(self, message: str):
        super().__init__(shortened(printable(message), MESSAGE_LENGTH))


class Place(NamedTuple):
    """Where the values of a tensor lie in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def place_of(name: str, dtype: object, shape: Sequence[int], start: int) -> Place:
    """The place of a tensor that begins at byte `start`. Raises StateFileError for a type or a shape that no state has."""
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise StateFileError(f"its tensor {shown(name)} has the type {shown(dtype)}, which no state has")
    shape = tuple(shape)
    if not 1 <= len(shape) <= 5 or not all(_whole(length, 1, 2**31) for length in shape):
        raise StateFileError(f"its tensor {shown(name)} has a shape that no state has")
    return Place(known, shape, start, math.prod(shape) * known.itemsize)


def stored_of(said: dict, places: dict[str, Place]) -> tuple[CacheState, list[Place]]:
    """What is said of a state, and where each chunk and then each prompt lies. Raises StateFileError for what no state is.

    The state's tensors are on the meta device: shapes and dtypes, no values.

    said: its model, model_name, key, texts and log. places: of its tensors, by their names.
    """
    records = tuple(_record(**entry) for entry in said["log"])
    texts = said["texts"]
    if not records or not isinstance(texts, list):
        raise StateFileError("its log is damaged: it has no chunks, or no list of texts")
    names = [f"chunk.{index}" for index in range(len(records))] + [f"prompt.{index}" for index in range(len(texts))]
    if places.keys() != set(names):
        others = sorted(places.keys() ^ set(names))
        raise StateFileError(f"its tensors are not those that its log tells of: {listed(others)}")
    ordered = [places[name] for name in names]
    _check_log(records, len(texts), ordered[0].shape[0])
    _check_shapes(records, ordered)
    strings = [*(text for text in texts if text is not None), said["model"], said["model_name"], said["key"]]
    if not all(isinstance(text, str) for text in strings):
        raise StateFileError("its log is damaged: something else stands where a text should be")
    empty = [torch.empty(place.shape, dtype=place.dtype, device="meta") for place in ordered]
    chunks, prompts = tuple(empty[: len(records)]), tuple(empty[len(records) :])
    state = CacheState(chunks, prompts, records, said["model"], said["key"], tuple(texts), said["model_name"])
    return state, ordered


def _record(seed: Any, **others: Any) -> ChunkRecord:
    return ChunkRecord(seed=tuple(seed) if isinstance(seed, list) else seed, **others)


def _check_log(records: Sequence[ChunkRecord], prompts: int, batch: int) -> None:
    """Raise StateFileError for what no log says. Prompts are numbered as they come up."""
    known = 0
    for number, record in enumerate(records):
        wrong = {
            "prompt": not _whole(record.prompt, 0, known),
            "negative": not _whole(record.negative, -1, known + (record.prompt == known)),
            "frames": not _whole(record.frames, 1, 2**31),
            "timestep": not (isinstance(record.timestep, float) and 0 <= record.timestep <= 1000),
            "seed": not _is_seed(record.seed, batch),
            "switch": record.switch not in ("", *SWITCHES) or bool(record.switch and not number),
            "given": not _whole(record.given, 0, record.frames),
        }
        for name in (name for name, bad in wrong.items() if bad):
            raise StateFileError(f"its log is damaged: chunk {number} has the {name} {shown(getattr(record, name))}")
        known = max(known, record.prompt + 1, record.negative + 1)
    if known != prompts:
        raise StateFileError(f"its log is damaged: it tells of {known} prompts, and the file holds {prompts}")


def _check_shapes(records: Sequence[ChunkRecord], places: Sequence[Place]) -> None:
    chunks, prompts = places[: len(records)], places[len(records) :]
    first = chunks[0].shape
    for number, (record, place) in enumerate(zip(records, chunks)):
        if place.shape != (*first[:2], record.frames, *first[3:]) or len(first) != 5:
            raise StateFileError(f"chunk {number} has the shape {list(place.shape)}, which does not fit its log")
    if first[1] not in GEOMETRIES:
        raise StateFileError(f"its latents have {first[1]} channels, which no model here has")
    for number, place in enumerate(prompts):
        if len(place.shape) != 3 or (place.shape[0], place.shape[2]) != (first[0], prompts[0].shape[-1]):
            raise StateFileError(f"prompt {number} has the shape {list(place.shape)}, which does not fit the others")


def _is_seed(seed: Any, batch: int) -> bool:
    if isinstance(seed, tuple):
        return len(seed) == batch > 1 and all(_whole(own, -(2**64), 2**64) for own in seed)
    return seed is None or _whole(seed, -(2**64), 2**64)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor of the CPU, in their order."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().data


def read_tensor(file: BinaryIO, place: Place) -> torch.Tensor:
    """The tensor at a place of a file. Raises StateFileError where the file ends before it."""
    file.seek(place.start)
    values = bytearray(place.nbytes)
    if file.readinto(values) != place.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
        raise StateFileError("the file was cut short while it was read")
    return torch.frombuffer(values, dtype=place.dtype).view(place.shape)
