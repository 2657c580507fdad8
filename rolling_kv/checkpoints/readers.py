"""Opening weight files: safetensors, pickles, GGUF, and folders of them.

Nothing is executed from a file: pickles (`.pt`, `.pth`, `.ckpt`, `.bin`) are read with `torch.load(weights_only=True)`.
Nothing in a file is believed before it is checked: sizes, nesting, names of other files, types of values.
Tensors are mapped from disk, and only for as long as it takes to load them (`float8.load_tensor` copies): a mapped file
that is cut short ends the process, one that is written over changes the weights.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..messages import MESSAGE_LENGTH, listed, printable, shortened, shown
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
_DEEPEST_WRAPPER = 8
_MOST_JSON = 16 * 2**20
"""Bytes of a JSON file; the index of a 14B model has a tenth of a MiB."""
_MOST_INFLATED = 20
"""What compression may save; weights are noise, and hardly get smaller at all."""


class CheckpointError(ValueError):
    """A model file that cannot be used. The message is for people: what is wrong, and what to do.

    It quotes files, and so it is made fit for every log: one line, without control characters, of bounded length.
    """

    def __init__(self, message: str):
        super().__init__(shortened(printable(message), MESSAGE_LENGTH))


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Put the path in front of the message of a CheckpointError from inside.

    Whatever other layers raise about content that nothing here expects becomes a CheckpointError too.
    """
    place = shortened(printable(str(path)), 240)
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError) as error:
        raise CheckpointError(f"{place}: {_damaged(path, error)}") from error


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    files: the weight files, in reading order.
    tensors: under the names of the file, without wrappers such as `generator_ema`; at least one.
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
    if not path.is_file():  # a pipe would wait for ever
        raise CheckpointError(f"this is a device or a pipe. Expected {_EXPECTED}.")
    if path.suffix.lower() in _SAFETENSORS:
        checkpoint = _open_safetensors(path, values)
    elif path.suffix.lower() in _PICKLES:
        checkpoint = _open_pickle(path)
    elif path.suffix.lower() == ".gguf":
        checkpoint = _open_gguf(path)
    else:
        raise CheckpointError(f"files of type {path.suffix or '(none)'} are not read here. Expected {_EXPECTED}.")
    if not checkpoint.tensors:
        raise CheckpointError("the file holds no tensors. Download it again, or choose another.")
    return checkpoint


def _open_folder(folder: Path, values: bool) -> Checkpoint:
    files = _weight_files(folder)
    parts = [open_checkpoint(file, values=values) for file in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    config = folder / "config.json"
    return Checkpoint(files, tensors, parts[0].metadata, read_json(config) if config.exists() else {}, parts[0].wrapper)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        return _shards(folder, indices[0])
    others = (f"*{suffix}" for suffix in _SAFETENSORS + _PICKLES)
    for pattern in ("diffusion_pytorch_model.safetensors", "model.safetensors", *others):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return tuple(found)
        if found:
            names = listed([file.name for file in found], 4)
            raise CheckpointError(f"the folder holds several weight files ({names}): choose one instead of the folder.")
    raise CheckpointError(
        "the folder holds no weights (.safetensors or .pt). Choose the model's own folder, the one with config.json in "
        "it, or the folder above it."
    )


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    """The files that an index lists. It names files of its own folder: others are nobody's business here."""
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f'{index.name} is damaged: its "weight_map" should give a file name for each tensor.')
    names = sorted(set(weight_map.values()))
    strange = [name for name in names if not _is_plain(name)]
    if strange:
        raise CheckpointError(
            f"{index.name} lists what is no .safetensors file of this folder ({listed(strange)}). Download the folder "
            "again, from a source that you trust."
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        raise CheckpointError(
            f"{index.name} lists {len(names)} files, and {len(absent)} of them are not in the folder "
            f"({listed(absent)}). Download the missing ones."
        )
    return tuple(folder / name for name in names)


def _is_plain(name: str) -> bool:
    """Whether this names a file in the same folder, whatever the system: Windows' rules know both kinds of slash."""
    return PureWindowsPath(name).name == name and name.lower().endswith(_SAFETENSORS) and "\0" not in name


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError when there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} is not a file.")
    if path.stat().st_size > _MOST_JSON:
        raise CheckpointError(
            f"{path.name} has {path.stat().st_size:,} bytes; {_MOST_JSON:,} are the most that is read as JSON."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} should hold a JSON object, not {shown(content)}.")
    return content


def known_fields(values: dict, checks: Mapping[str, Callable[[str, object], None]]) -> dict:
    """Those entries of a config that have a check here. null counts as absent.

    checks: by name, functions of name and value that raise ValueError, such as `config.check_whole`.

    Raises CheckpointError for a value of another type, or out of its bounds.
    """
    known = {name: values[name] for name in checks if values.get(name) is not None}
    for name, value in known.items():
        try:
            checks[name](name, value)
        except ValueError as error:
            raise CheckpointError(f"the model's config is damaged: {error}.") from error
    return known


def _open_safetensors(path: Path, values: bool) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            read = file.get_tensor if values else lambda name: _without_values(file.get_slice(name))
            tensors = {name: read(name) for name in file.keys()}
            return Checkpoint((path,), tensors, file.metadata() or {})
    except Exception as error:  # the library's own class, and what torch raises for types that it does not have
        raise CheckpointError(_not_a_model(path) or _damaged(path, error)) from error


def _without_values(entry) -> Tensor:
    return torch.empty(entry.get_shape(), dtype=_FLOATS.get(entry.get_dtype(), torch.uint8), device="meta")


def _open_pickle(path: Path) -> Checkpoint:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own text tells people to allow the code; its cause is the one thing of use in it.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(_not_a_model(path) or _more_than_tensors(code[1] if code else "")) from None
    except Exception as error:  # a damaged pickle can make any of them
        raise CheckpointError(_not_a_model(path) or _damaged(path, error)) from error
    return _unwrap(path, content)


def _can_be_mapped(path: Path) -> bool:
    """Whether the values lie in the file as they are: in a zip archive (files from before torch 1.6 are none), stored.

    An archive that somebody has packed again may be compressed; mapped, its values would be noise.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    inflated, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if inflated > _MOST_INFLATED * size:
        raise CheckpointError(f"the file has {size:,} bytes and claims to hold {inflated:,}. Download it again.")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _open_gguf(path: Path) -> Checkpoint:
    try:
        return Checkpoint((path,), read_gguf(path))
    except (ImportError, NotImplementedError) as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # the package checks little, so anything can go wrong in it
        raise CheckpointError(_not_a_model(path) or _damaged(path, error)) from error


def _unwrap(path: Path, content) -> Checkpoint:
    wrappers = []
    while isinstance(content, dict):
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if wrapper is None:
            break
        wrappers.append(wrapper)
        if len(wrappers) > _DEEPEST_WRAPPER:  # one that holds itself has no end
            raise CheckpointError(
                f"the file is wrapped more than {_DEEPEST_WRAPPER} times ({'.'.join(wrappers[:3])}…), as no tool "
                "does. Download it again, from a source that you trust."
            )
        content = content[wrapper]
    if not isinstance(content, dict):
        raise CheckpointError(f"the file holds a {type(content).__name__} where named tensors were expected.")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        entries = [name if isinstance(name, str) else shown(name) for name in content]
        raise CheckpointError(f"the file holds no tensors; its entries are {listed(entries, 5)}.")
    _check_storage(tensors, path.stat().st_size)
    return Checkpoint((path,), tensors, wrapper=".".join(wrappers))


def _check_storage(tensors: dict[str, Tensor], file_size: int) -> None:
    """Raise CheckpointError for tensors that claim more values than the file holds: views of few values as many."""
    claimed = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{shortened(name)} is no ordinary tensor ({tensor.layout}, {tensor.device}).")
        claimed += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{shortened(name)} claims the shape {list(tensor.shape)[:8]}, {tensor.nbytes:,} bytes, of which the "
                f"file holds {tensor.untyped_storage().nbytes():,}."
            )
    if claimed > _MOST_INFLATED * file_size:
        raise CheckpointError(f"the tensors claim {claimed:,} bytes, and the file has {file_size:,}.")


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
        f"the file holds more than tensors{code and f' ({shortened(code)})'}, or is damaged. A file that holds more can "
        "run code when it is opened, so it was not. Use the model's .safetensors version, or ask its author for one."
    )


def _damaged(path: Path, error: Exception) -> str:
    size = f"{path.stat().st_size:,} bytes; " if path.is_file() else ""
    return f"the file is damaged or incomplete ({size}{_reason(error)}). Download it again."


def _reason(error: Exception) -> str:
    """What an error of another layer says, as part of a sentence."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = str(error).strip()
    if not text:
        return "it ends too early"
    text = shortened(printable(text.splitlines()[0]), 200)
    return (
        text
        if isinstance(error, (ValueError, RuntimeError, OSError, SafetensorError))
        else f"{type(error).__name__}: {text}"
    )
