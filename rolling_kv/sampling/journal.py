"""The state of a video that is being made, on disk after every chunk: one file that only grows.

A run that is killed leaves its journal, and a state can be read from it: `state_file.load_state` takes it as it takes a
state's file. What was being written when the run ended is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from ..atomic import check_place, replacing
from .state import CacheState, ChunkRecord
from .stored import NAMES, Place, StateFileError, place_of, stored_of, tensor_bytes

SUFFIX = ".journal"
MAGIC = b"rolling_kv.journal 1\n"
MOST_TEXT = 16 * 2**20
"""Bytes of what an entry says, beside its tensors."""
MAPPED_AT_ONCE = 64
"""Chunks that stay in memory until they are read from the file instead, all with one mapping."""

_HEAD = struct.Struct("<IQ32s")
"""Of an entry: bytes of its text and of its tensors, and the SHA-256 of both."""
_CHECK = struct.Struct("<I")
"""CRC-32 of the head, so that a damaged length is not taken for a file that was cut short."""
_ALIGNMENT = 64
"""Bytes at a multiple of which the tensors of an entry begin."""


class Journal:
    """Writes a growing state chunk by chunk. A context manager, which only closes the file: `remove` is for its owner.

    path: ends in .journal. What is there stays until the first `add` has everything on disk that it was given.

    Where the system allows it, chunks that are on disk are read from there when somebody asks for them, and hold no memory.
    """

    def __init__(self, path: str | Path):
        self.path = check_place(path)
        self._file: BinaryIO | None = None
        self._chunks = self._prompts = 0
        self._places: list[Place] = []
        self._mapped: tuple[torch.Tensor, ...] = ()

    def add(self, state: CacheState) -> CacheState:
        """Put on disk what is new in a state; returns the same state, with chunks that lie in the file.

        state: what was added before, grown by some chunks.
        Raises OSError where it cannot be written: the journal then ends with what it held before.
        """
        new = state.records[self._chunks :]
        if not new:
            return state
        if self._file is None:
            with replacing(self.path, what="journal") as part, part.open("wb") as file:
                file.write(MAGIC)
                self._write(file, {"model": state.model, "model_name": state.model_name}, [])
                self._append(file, state, new)
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
            self._file.seek(0, os.SEEK_END)
            os.fsync(self._file.fileno())
        else:
            end = self._file.tell()
            try:
                self._append(self._file, state, new)
                os.fsync(self._file.fileno())
            except BaseException:
                self._file.truncate(end)
                self._file.seek(end)
                raise
        self._chunks, self._prompts = len(state.records), len(state.prompts)
        return self._with_mapped(state, self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close and delete the file. States that lie in it stay as they are."""
        self.__exit__()
        self.path.unlink(missing_ok=True)

    def _append(self, file: BinaryIO, state: CacheState, records: Sequence[ChunkRecord]) -> None:
        known = self._prompts
        del self._places[self._chunks :]  # those of a try that failed
        for number, record in enumerate(records, self._chunks):
            before, known = known, max(known, record.prompt + 1, record.negative + 1)
            named = [(f"chunk.{number}", state.chunks[number])]
            named += [(f"prompt.{index}", state.prompts[index]) for index in range(before, known)]
            said = {
                "record": record._asdict(),
                "texts": state.named(()).texts[before:known],
                "key": state.key if number + 1 == len(state.records) else "",
                "tensors": [[name, NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in named],
            }
            start = self._write(file, said, [tensor for _, tensor in named])
            chunk = state.chunks[number]
            self._places.append(Place(chunk.dtype, tuple(chunk.shape), start, chunk.nbytes))

    def _write(self, file: BinaryIO, said: dict, tensors: Sequence[torch.Tensor]) -> int:
        """Write an entry; returns the byte at which its tensors begin."""
        text = json.dumps(said, allow_nan=False, separators=(",", ":")).encode()
        start = file.tell() + _HEAD.size + _CHECK.size + len(text)
        text += b" " * (-start % _ALIGNMENT)
        digest, values = hashlib.sha256(text), [tensor_bytes(tensor) for tensor in tensors]
        for part in values:
            digest.update(part)
        head = _HEAD.pack(len(text), sum(part.nbytes for part in values), digest.digest())
        for part in (head + _CHECK.pack(zlib.crc32(head)) + text, *values):
            _write_all(file, part)
        return start + -start % _ALIGNMENT

    def _with_mapped(self, state: CacheState, file: BinaryIO) -> CacheState:
        if os.name == "nt" or len(state.chunks) - len(self._mapped) < MAPPED_AT_ONCE:
            return state  # Windows deletes no file that is mapped
        values = np.memmap(file, np.uint8, mode="c")  # of this very file, whatever has its name
        file.seek(0, os.SEEK_END)
        self._mapped = tuple(
            torch.from_numpy(values[place.start : place.start + place.nbytes]).view(place.dtype).view(place.shape)
            for place in self._places
        )
        return state._replace(chunks=self._mapped)


def _write_all(file: BinaryIO, values: bytes | memoryview) -> None:
    """Write all of it: a file without a buffer may take a part at a time."""
    values = memoryview(values).cast("B")
    while values:
        values = values[file.write(values) :]


class _Entry(NamedTuple):
    said: dict
    start: int
    nbytes: int


def read_journal(file: BinaryIO) -> tuple[CacheState, list[Place]]:
    """The state in a journal, without values, and where each chunk and then each prompt lies in the file.

    An entry that was not written to its end is left out. Raises StateFileError for a file that is no journal, holds no whole
    chunk, or was altered.
    """
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        raise StateFileError("this is no journal of a video")
    entries = _entries(file)
    first = next(entries, None)
    if first is None:
        raise StateFileError("this journal ends before its first chunk is whole")
    said = {"model": first.said["model"], "model_name": first.said["model_name"], "key": "", "texts": [], "log": []}
    places: dict[str, Place] = {}
    for entry in entries:
        end = entry.start
        for name, dtype, shape in entry.said["tensors"]:
            places[name] = place = place_of(name, dtype, shape, end)
            end += place.nbytes
        if end != entry.start + entry.nbytes:
            raise StateFileError(f"its chunk {len(said['log'])} is damaged: what it says is not what it holds")
        said["log"].append(entry.said["record"])
        said["texts"] += entry.said["texts"]
        said["key"] = entry.said["key"]
    if not said["log"]:
        raise StateFileError("this journal ends before its first chunk is whole")
    return stored_of(said, places)


def _entries(file: BinaryIO) -> Iterator[_Entry]:
    """The entries of a journal up to its end, or up to one that was not written to its end."""
    size, at = os.fstat(file.fileno()).st_size, len(MAGIC)
    while at < size:
        file.seek(at)
        head = file.read(_HEAD.size + _CHECK.size)
        if len(head) < _HEAD.size + _CHECK.size:
            return
        length, nbytes, digest = _HEAD.unpack(head[: _HEAD.size])
        start = at + len(head) + length
        whole = _CHECK.unpack(head[_HEAD.size :])[0] == zlib.crc32(head[: _HEAD.size]) and length <= MOST_TEXT
        at = start + nbytes if whole else at + len(head)
        if at > size:
            return
        text = file.read(length) if whole else b""
        if not whole or _digest(text, file, nbytes) != digest:
            if _only_zeros(file, at):
                return
            raise StateFileError("the journal was altered or damaged after it was written")
        yield _Entry(json.loads(text), start, nbytes)


def _digest(text: bytes, file: BinaryIO, nbytes: int) -> bytes:
    """Of a text and of the next bytes of a file."""
    found = hashlib.sha256(text)
    while nbytes and (block := file.read(min(nbytes, 2**20))):
        found.update(block)
        nbytes -= len(block)
    return found.digest()


def _only_zeros(file: BinaryIO, at: int) -> bool:
    """Whether a file ends there, or goes on as one does whose power went before all of it was on disk."""
    file.seek(at)
    return not any(any(block) for block in iter(lambda: file.read(2**20), b""))
