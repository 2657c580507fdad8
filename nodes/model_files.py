"""Where model files are looked for, how combos name them, and what to say when one is missing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import folder_paths

from ..rolling_kv.bundled import BUNDLED, BUNDLED_LORA
from ..rolling_kv.messages import shown
from ..rolling_kv.presets import DEFAULT_PRESET, TEXT_ENCODER_FILES, VAE_FILE

BUNDLED_NAME, BUNDLED_LORA_NAME = "tiny (bundled)", "stripes (bundled)"
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
LONGEST, LONGEST_PART = 4096, 255
"""Characters of a path, and of a name in it, that a file system may have."""


class Kind(NamedTuple):
    """One kind of model file.

    title: in messages.
    folder: ComfyUI's name of the folder for single files.
    subfolder: its place in a diffusers folder, "" where it is in none.
    link: where to get one.
    instead, sign: ComfyUI's name of another folder, whose files with that in their names do as well; "" for none.
    """

    title: str
    folder: str
    subfolder: str = ""
    link: str = ""
    instead: str = ""
    sign: str = ""


MODEL = Kind("model", "diffusion_models", "transformer", DEFAULT_PRESET.files[0].url)
TEXT_ENCODER = Kind("text encoder", "text_encoders", "text_encoder", TEXT_ENCODER_FILES[0].url)
VAE = Kind("VAE", "vae", "vae", VAE_FILE.url, instead="vae_approx", sign="taew2_")
LORA = Kind("LoRA", "loras")


def choices(kind: Kind) -> list[str]:
    """Names for a combo: the bundled model, single files, then diffusers folders in models/diffusers."""
    names = [name for name, _ in _bundled(kind)]
    if not kind.subfolder:
        return names + folder_paths.get_filename_list(kind.folder)
    names += [name for name in folder_paths.get_filename_list(kind.folder) if name.lower().endswith(SUFFIXES)]
    if kind in (MODEL, TEXT_ENCODER):  # ComfyUI does not list these
        names += sorted(name for name in _files(kind.folder) if name.lower().endswith(".gguf"))
    if kind.instead:
        names += [name for name in folder_paths.get_filename_list(kind.instead) if kind.sign in name.lower()]
    return names + sorted(_diffusers_folders(kind.subfolder))


def find(kind: Kind, name: object) -> Path | None:
    """The file or folder that a combo's `name` stands for, with either kind of slash; None if there is none.

    A name never leads out of the folders.
    """
    for bundled, path in _bundled(kind):
        if name == bundled:
            return path
    below = inside(name)
    if below is None:
        return None
    for folder in filter(None, (kind.folder, kind.instead)):
        single = folder_paths.get_full_path(folder, str(below))
        if single is not None:
            return Path(single)
    folders = (Path(root, below) for root in folder_paths.get_folder_paths("diffusers") if kind.subfolder)
    return next((folder for folder in folders if os.path.isdir(folder / kind.subfolder)), None)


def inside(name: object) -> Path | None:
    """The path below a folder that a name stands for, with either kind of slash; None where it would lead out of it."""
    if not isinstance(name, str) or not name:
        return None
    parts = name.replace("\\", "/").split("/")
    outside = ".." in parts or PureWindowsPath(name).anchor  # a drive, a share, or a root on any system
    if outside or "\0" in name or len(name) > LONGEST or max(map(len, parts)) > LONGEST_PART:
        return None
    return Path(*parts)


def get(kind: Kind, name: object) -> Path:
    """What `find` finds. Raises ValueError where that is nothing, which says what to do."""
    path = find(kind, name)
    if path is None:
        raise ValueError(missing(kind, name))
    return path


def check(kind: Kind, name: object) -> bool | str:
    """For `validate_inputs`: True, or what to do about a missing file. A name that comes over a link is not known yet."""
    return True if name is None or find(kind, name) is not None else missing(kind, name)


def missing(kind: Kind, name: object) -> str:
    """What is said of a file that is not there."""
    said = f"The {kind.title} {shown(name)} was not found." if name else f"No {kind.title} is chosen."
    places = " or ".join(folder_paths.get_folder_paths(kind.folder))
    folders = " (or a diffusers folder into models/diffusers)" if kind.subfolder else ""
    link = f" One that works: {kind.link}" if kind.link else ""
    return f"{said} Put the file into {places}{folders}, then press R to refresh.{link}"


def _bundled(kind: Kind) -> list[tuple[str, Path]]:
    """What the pack itself has of a kind: its name in a combo, and the folder or file; empty where it is not there."""
    name, path = (BUNDLED_NAME, BUNDLED) if kind.subfolder else (BUNDLED_LORA_NAME, BUNDLED_LORA)
    return [(name, path)] if (path / kind.subfolder).exists() else []


def _diffusers_folders(subfolder: str) -> set[str]:
    """The diffusers folders that have such a part, by their names below models/diffusers."""
    inside = [Path(name).parents for name in _files("diffusers")]
    return {str(above[1]) for above in inside if len(above) > 2 and above[0].name == subfolder}


def _files(folder: str) -> list[str]:
    """Names of all files in ComfyUI's folders of one kind."""
    return [name for root in folder_paths.get_folder_paths(folder) for name in listing(root).names()]


class Listing:
    """The files below a folder. It is walked again only when it or a folder in it has changed, as in `folder_paths`.

    links: whether folders elsewhere that links lead to count as below it.
    """

    def __init__(self, root: str, links: bool):
        self.root = root
        self.links = links
        self.files: list[str] = []
        self.times: dict[str, float] = {}  # when each folder was last changed

    def names(self) -> list[str]:
        """Names of the files, relative to the folder."""
        if not self.times or any(_changed(folder) != time for folder, time in self.times.items()):
            self.files, self.times = self._walk()
        return self.files

    def _walk(self) -> tuple[list[str], dict[str, float]]:
        if self.links:
            return folder_paths.recursive_search(self.root, [".git"])
        files, times = [], {}
        for folder, _, names in os.walk(self.root):
            times[folder] = _changed(folder)
            files += [os.path.relpath(os.path.join(folder, name), self.root) for name in names]
        return files, times


def _changed(folder: str) -> float | None:
    return os.path.getmtime(folder) if os.path.isdir(folder) else None


@cache
def listing(root: str, links: bool = True) -> Listing:
    """That of a folder, which is kept."""
    return Listing(root, links)
