"""States in ComfyUI's input and output folders: which there are, what a name stands for, and nothing outside."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..rolling_kv.messages import shown
from ..rolling_kv.sampling import journal
from ..rolling_kv.sampling.state_file import SUFFIX, is_state_file
from .model_files import inside, listing

IN_OUTPUT = " [output]"
"""How names of files in the output folder end, as everywhere in ComfyUI; those in the input folder have no such end."""
IN_INPUT = " [input]"
SUFFIXES = (SUFFIX, journal.SUFFIX)
"""Of files, and of what a stream keeps beside the video that it is writing."""


def choices() -> list[str]:
    """Names for a combo: the states in the input folder, then those in the output folder."""
    named = [(folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), IN_OUTPUT)]
    return [name + end for root, end in named for name in sorted(_states_in(root))]


def find(name: object) -> Path | None:
    """The file that a combo's `name` stands for, with either kind of slash; None if there is none.

    A name never leads out of the two folders, nor does a link in them.
    """
    if not isinstance(name, str):
        return None
    root = folder_paths.get_output_directory() if name.endswith(IN_OUTPUT) else folder_paths.get_input_directory()
    below = inside(name.removesuffix(IN_OUTPUT).removesuffix(IN_INPUT))
    if below is None or not folder_paths.is_within_directory(root, str(Path(root, below))):
        return None
    path = Path(root, below)
    return path if os.path.isfile(path) else None


def get(name: object) -> Path:
    """What `find` finds. Raises ValueError, with what to do, where that is nothing."""
    path = find(name)
    if path is None:
        raise ValueError(missing(name))
    return path


def check(name: object) -> bool | str:
    """For `validate_inputs`: True, or what to do about a missing file. A name that comes over a link is not known yet."""
    return True if name is None or find(name) is not None else missing(name)


def missing(name: object) -> str:
    """What is said of a file that is not there."""
    said = f"The state {shown(name)} was not found." if name else "No state is chosen."
    places = f"{folder_paths.get_input_directory()} or {folder_paths.get_output_directory()}"
    return f"{said} Put the file into {places}, or make one with Save State, then press R to refresh."


def place_for(prefix: str, height: int, width: int, suffix: str = SUFFIX) -> tuple[Path, str]:
    """A new file in the output folder, and its name below that, with forward slashes.

    prefix: of its name, with folders, as ComfyUI's nodes that save have it. height, width: pixels, which it may ask for.

    Raises ValueError for a prefix that leads out of the folder.
    """
    root = folder_paths.get_output_directory()
    below = inside(prefix)
    if below is None or not below.name or not folder_paths.is_within_directory(root, str(Path(root, below.parent))):
        raise ValueError(
            f"filename_prefix cannot be {shown(prefix)}: it is a name in ComfyUI's output folder, which may have folders "
            "before it, as states/rolling_kv has"
        )
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(str(below), root, width, height)
    file = f"{name}_{counter:05}_{suffix}"
    return Path(folder, file), Path(subfolder, file).as_posix()


def saved(name: str) -> ui.SavedResult:
    """A file of that name below the output folder, as the server tells its clients of one."""
    folder, _, file = name.rpartition("/")
    return ui.SavedResult(file, folder, io.FolderType.output)


def _states_in(root: str) -> list[str]:
    names = (name for name in listing(root, links=False).names() if name.lower().endswith(SUFFIXES))
    return [Path(name).as_posix() for name in names if _is_state(root, name)]


def _is_state(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    if not folder_paths.is_within_directory(root, path):
        return False
    try:
        facts = os.stat(path)
    except OSError:  # it is gone, or a link leads nowhere
        return False
    return _says_state(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=10_000)
def _says_state(path: str, changed: int, size: int) -> bool:
    """Whether a file says that it is a state; asked anew when it has changed."""
    return is_state_file(path)
