"""Opening weight files: safetensors, pickles, and folders of them.

Nothing is executed from a file: pickles (`.pt`, `.pth`, `.ckpt`, `.bin`) are read with `torch.load(weights_only=True)`.
Tensors are mapped from disk: their values are read when they are used.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .gguf import read_gguf

_FLOATS = {  # by their names in a safetensors header; no other type holds weights that are read here
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_EXPECTED = "a .safetensors, .gguf, .pt or .pth file, or a folder in the diffusers layout"
_SAFETENSORS = (".safetensors", ".sft")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_WRAPPERS = ("generator_ema", "generator", "model", "state_dict", "generator_lora")


class CheckpointError(ValueError):
    """A model file that cannot be used. The message is for people: what is wrong, and what to do."""


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Put the path in front of the message of a CheckpointError from inside."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    files: the weight files, in reading order.
    tensors: under the names of the file, without wrappers such as `generator_ema`.
    metadata: of a safetensors file.
    config: the content of `config.json`, for a folder.
    wrapper: the entries of a pickle that led to the tensors, for example "generator_ema".
    """

    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    wrapper: str = ""


def open_checkpoint(path: Path, *, values: bool = True) -> Checkpoint:
    """Open a weight file, or a folder that holds one or the shards of one. Raises CheckpointError.

    values: False reads only the header of a safetensors file, and gives tensors on the meta device.
    """
    if path.is_dir():
        return _open_folder(path, values)
    if not path.exists():
        raise CheckpointError(f"there is no such file or folder. Expected {_EXPECTED}.")
    if path.suffix.lower() in _SAFETENSORS:
        return _open_safetensors(path, values)
    if path.suffix.lower() in _PICKLES:
        return _open_pickle(path)
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    raise CheckpointError(f"files of type {path.suffix or '(none)'} are not read here. Expected {_EXPECTED}.")


def _open_folder(folder: Path, values: bool) -> Checkpoint:
    files = _weight_files(folder)
    parts = [open_checkpoint(file, values=values) for file in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    config = folder / "config.json"
    return Checkpoint(files, tensors, parts[0].metadata, read_json(config) if config.exists() else {}, parts[0].wrapper)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(read_json(indices[0]).get("weight_map", {}).values()))
        absent = [name for name in names if not (folder / name).exists()]
        if absent or not names:
            raise CheckpointError(
                f"{indices[0].name} lists {len(names)} files, and {len(absent)} of them are not in the folder "
                f"({', '.join(absent[:3])}). Download the missing ones."
            )
        return tuple(folder / name for name in names)
    others = (f"*{suffix}" for suffix in _SAFETENSORS + _PICKLES)
    for pattern in ("diffusion_pytorch_model.safetensors", "model.safetensors", *others):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return tuple(found)
        if found:
            names = ", ".join(file.name for file in found[:4])
            raise CheckpointError(f"the folder holds several weight files ({names}): choose one instead of the folder.")
    raise CheckpointError(
        "the folder holds no weights (.safetensors or .pt). Choose the model's own folder, the one with config.json in "
        "it, or the folder above it."
    )


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} should hold a JSON object, not a {type(content).__name__}.")
    return content


def _open_safetensors(path: Path, values: bool) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            read = file.get_tensor if values else lambda name: _without_values(file.get_slice(name))
            tensors = {name: read(name) for name in file.keys()}
            return Checkpoint((path,), tensors, file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(_not_a_model(path) or _damaged(path, error)) from error


def _without_values(entry) -> Tensor:
    return torch.empty(entry.get_shape(), dtype=_FLOATS.get(entry.get_dtype(), torch.uint8), device="meta")


def _open_pickle(path: Path) -> Checkpoint:
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own text tells people to allow the code; its cause is the one thing of use in it.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(_not_a_model(path) or _more_than_tensors(code[1] if code else "")) from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(_not_a_model(path) or _damaged(path, error)) from error
    return _unwrap(path, content)


def _open_gguf(path: Path) -> Checkpoint:
    try:
        return Checkpoint((path,), read_gguf(path))
    except (ImportError, NotImplementedError) as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, IndexError, OverflowError, KeyError) as error:
        raise CheckpointError(_not_a_model(path) or _damaged(path, error)) from error


def _unwrap(path: Path, content) -> Checkpoint:
    wrappers = []
    while isinstance(content, dict):
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if wrapper is None:
            break
        wrappers.append(wrapper)
        content = content[wrapper]
    if not isinstance(content, dict):
        raise CheckpointError(f"the file holds a {type(content).__name__} where named tensors were expected.")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"the file holds no tensors; its entries are {', '.join(map(str, list(content)[:5]))}.")
    return Checkpoint((path,), tensors, wrapper=".".join(wrappers))


def _not_a_model(path: Path) -> str:
    """What a failed download has left under the name of a model; empty when it is nothing known."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself. Run `git lfs pull`, or download the file in a browser."
    if start.startswith(b"<"):
        return "this is a web page that was saved under a model's name. Download the file itself."
    return ""


def _more_than_tensors(code: str) -> str:
    return (
        f"the file holds more than tensors{code and f' ({code})'}, or is damaged. A file that holds more can run code "
        "when it is opened, so it was not. Use the model's .safetensors version, or ask its author for one."
    )


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else "it ends too early"
    return f"the file is damaged or incomplete ({path.stat().st_size:,} bytes; {reason}). Download it again."
