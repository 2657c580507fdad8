"""A `CacheState` as a file: latents, prompts and the log in one safetensors file, with a digest over all of it.

Nothing is executed from a file, and nothing in it is believed before it is checked: first the sizes, then the digest, then
what the log says. Only then are tensors read, and the key that follows from them has to be the one that was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from ..atomic import check_place, replacing
from ..checkpoints.model import CausalModel
from ..messages import printable, shortened, shown
from .journal import MAGIC, read_journal
from .state import CacheState
from .stored import NAMES, Place, StateFileError, place_of, read_tensor, stored_of, tensor_bytes

SUFFIX = ".safetensors"
FORMAT = "rolling_kv.state"
VERSION = "1"
MOST_HEADER = 16 * 2**20
"""Bytes of a header; a chunk takes about 170 of them, and so this is most of a day."""

_NO_DIGEST = "0" * 64
_BLOCK = 2**20
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How pickles begin, and the archives that they lie in."""


def save_state(state: CacheState, path: str | Path) -> Path:
    """Write a state into a file, which appears when it is whole; returns the path.

    path: ends in .safetensors.

    Raises ValueError for an empty state and for a name that no state can have, OSError for a place that cannot be written.
    """
    path = check_state_path(path)
    if not state.chunks:
        raise ValueError("this cache state holds no frames yet: there is nothing to save")
    tensors = {f"chunk.{index}": chunk for index, chunk in enumerate(state.chunks)}
    tensors |= {f"prompt.{index}": prompt for index, prompt in enumerate(state.prompts)}
    header = _header(state, tensors)
    digest = hashlib.sha256(header)
    for tensor in tensors.values():
        digest.update(tensor_bytes(tensor))
    with replacing(path, what="cache state") as part, part.open("wb") as file:
        file.write(header.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1))
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))
    return path


def load_state(
    path: str | Path,
    model: CausalModel | None = None,
    size: tuple[int, int] | None = None,
    *,
    identity: str | None = None,
) -> CacheState:
    """The state in a file, or in the journal of a run that was killed: equal to the one that was saved, to the bit.

    model: that is to continue it. size: height and width in pixels that are asked for.
    identity: of the model with LoRAs that are applied when it runs; None: its own.

    Raises StateFileError, before any tensor is read, for a file that is no state, is cut short or altered, for a state of
    another version, and for one of another model or size than given.
    """
    with _telling(path), _opened(path) as file:
        stored, places = _read_header(file)
        _check_model(stored, model, identity)
        _check_size(stored, size)
        tensors = [read_tensor(file, place) for place in places]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise StateFileError("it holds values that are no numbers (NaN or infinity), so nothing can follow it")
        records = stored.records
        chunks, prompts = tuple(tensors[: len(records)]), tuple(tensors[len(records) :])
        named = stored.model, stored.texts, stored.model_name
        state = CacheState.from_log(chunks, prompts, records, *named)
        if stored.key not in (state.key, ""):
            raise StateFileError(f"its log and its latents make the key {state.key}, not {stored.key}")
        return state


def read_state(path: str | Path) -> CacheState:
    """What a state's file or journal says, checked against its digest; no tensor is read. Raises StateFileError."""
    with _telling(path), _opened(path) as file:
        return _read_header(file)[0]


def is_state_file(path: str | Path) -> bool:
    """Whether a file says that it is a cache state, or a journal; it may be damaged all the same."""
    try:
        with _opened(path) as file:
            return _is_journal(file) or _metadata(_parsed(_raw_header(file))).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def check_state_path(path: str | Path) -> Path:
    """The path as one. Raises ValueError or OSError for what cannot be the file of a state."""
    path = Path(path)
    check_place(path)
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"the name of a cache state must end in {SUFFIX}, got {shown(path.name)}")
    return path


# Writing


def _header(state: CacheState, tensors: dict[str, torch.Tensor]) -> bytes:
    """The file up to the first tensor, without the digest."""
    said = {
        "model": state.model,
        "model_name": state.model_name,
        "key": state.key,
        "texts": state.named(()).texts,
        "log": [record._asdict() for record in state.records],
    }
    # The digest comes first, so that its place is found whatever the texts say.
    metadata = {"digest": _NO_DIGEST, "format": FORMAT, "version": VERSION, "state": json.dumps(said, allow_nan=False)}
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER:
        raise ValueError(f"a video of {len(state.records):,} chunks is too long for the file of a cache state")
    return len(text).to_bytes(8, "little") + text


# Reading


@contextmanager
def _telling(path: str | Path) -> Iterator[None]:
    """Put the path in front of what is wrong with a file; what nobody expects in one becomes a sentence, too."""
    place = shortened(printable(str(path)), 240)
    try:
        yield
    except StateFileError as error:
        raise StateFileError(f"{place}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StateFileError(f"{place}: the file is damaged ({shortened(str(error), 200)})") from error


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    if "\0" in str(path) or not os.path.exists(path):
        raise StateFileError("there is no such file")
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise StateFileError("this is no file: choose a cache state that was saved")
    with open(path, "rb") as file:
        yield file


def _raw_header(file: BinaryIO) -> bytes:
    """The file up to its first tensor. Raises StateFileError before it reads more than there may be."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[8:] != b"{":
        kind = "a pickle or an archive, which was not opened, as it could run code" if start[:2] in _PICKLES else ""
        raise StateFileError(f"this is {kind or 'no safetensors file'}. Choose a cache state that was saved")
    if length > MOST_HEADER:
        raise StateFileError(f"its header claims to be {length:,} bytes; {MOST_HEADER:,} are the most that is read")
    if length > size - 8:
        raise StateFileError(f"the file is cut short: its header is {length:,} bytes, and the file {size:,}")
    file.seek(0)
    return file.read(8 + length)


def _parsed(raw: bytes) -> dict:
    try:
        header = json.loads(raw[8:])
    except (ValueError, RecursionError):
        raise StateFileError("its header is damaged: it is no JSON") from None
    if not isinstance(header, dict):
        raise StateFileError("its header is damaged: it is no JSON object")
    return header


def _metadata(header: dict) -> dict[str, str]:
    found = header.get("__metadata__")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return {}
    return found


def _is_journal(file: BinaryIO) -> bool:
    start = file.read(len(MAGIC))
    file.seek(0)
    return start == MAGIC


def _read_header(file: BinaryIO) -> tuple[CacheState, list[Place]]:
    """What the file says, and where each chunk and then each prompt lies in it."""
    if _is_journal(file):
        return read_journal(file)
    raw = _raw_header(file)
    header = _parsed(raw)
    metadata = _metadata(header)
    if metadata.get("format") != FORMAT:
        raise StateFileError("this is a safetensors file, but no cache state. Choose one that was saved as such")
    if (version := metadata.get("version", "")) != VERSION:
        raise StateFileError(
            f"this cache state is of version {shown(version)}, and {VERSION!r} is what is read here: use the version of "
            "Rolling KV that saved it, or a newer one"
        )
    places = _places(header, len(raw), os.fstat(file.fileno()).st_size)
    _check_digest(file, raw, metadata.get("digest", ""))
    said = json.loads(metadata["state"], parse_constant=_no_number)
    return stored_of(said, places)


def _places(header: dict, start: int, size: int) -> dict[str, Place]:
    """Where each tensor lies. Raises StateFileError unless they fill the rest of the file, one after the other."""
    places, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        place = place_of(name, entry["dtype"], entry["shape"], start + end)
        if entry["data_offsets"] != [end, end + place.nbytes]:
            raise StateFileError(f"its tensor {shown(name)} does not lie where the one before it ends")
        places[name] = place
        end += place.nbytes
    if start + end != size:
        what = "cut short" if start + end > size else "longer than what it holds"
        raise StateFileError(f"the file is {what}: its tensors end at byte {start + end:,}, and the file at {size:,}")
    return places


def _check_digest(file: BinaryIO, raw: bytes, digest: str) -> None:
    found = hashlib.sha256(raw.replace(digest.encode(), _NO_DIGEST.encode(), 1) if digest else raw)
    file.seek(len(raw))
    while block := file.read(_BLOCK):
        found.update(block)
    if found.hexdigest() != digest:
        raise StateFileError("the file was altered or damaged after it was saved: its digest is another")


def _no_number(text: str):
    raise StateFileError(f"its log is damaged: it says {text} where a number should be")


def _check_model(stored: CacheState, model: CausalModel | None, identity: str | None) -> None:
    if model is None or (identity := identity or model.identity) == stored.model:
        return
    theirs, ours = (str(dtype).removeprefix("torch.") for dtype in (stored.chunks[-1].dtype, model.dtype))
    raise StateFileError(
        f"this video was made by the model {shortened(stored.model_name) or 'with the identity'} "
        f"({shortened(stored.model, 16)}, {theirs}), and here is {model.preset.name} ({identity}, {ours}): load the "
        "same model, in the same precision and with the same LoRAs"
    )


def _check_size(state: CacheState, size: tuple[int, int] | None) -> None:
    height, width = state.size
    if size is not None and tuple(size) != (height, width):
        raise StateFileError(
            f"this video is {width}x{height} pixels, and {size[1]}x{size[0]} are asked for: a video keeps its size"
        )
