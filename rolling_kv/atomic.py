"""Files and folders that take their name only when they are whole.

Until then they lie beside their place under a hidden name, which holds the machine and the process that writes. A writer
that fails or is interrupted removes what it has begun. What a killed one leaves is removed by the next writer to the same
place.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil

NAME_LENGTH = 40
"""Characters of the place's name in the hidden one, which must not become longer than file systems allow."""
CLOCK_SECONDS = 2.0
"""How exactly the start of a process and the time of a file can be compared."""


@contextmanager
def replacing(place: str | Path, *, folder: bool = False, what: str = "file") -> Iterator[Path]:
    """Yield a new, empty file or folder to write to, which takes the place when the block has ended well.

    What was at the place stays until then, and for good if the block raises: then the new one is removed. A symbolic link
    is followed, and stays a link. Missing folders on the way are made.

    place: where the file or folder goes. A folder takes the place of an empty one only.
    folder: whether a folder is made, rather than a file.
    what: how to call it in messages.

    Raises ValueError or OSError on entering if nothing can be written at the place. Raises OSError on leaving if the
    place cannot be taken: the new file or folder is kept then, under a name that the message tells.
    """
    place = check_place(place, folder=folder)
    part = place.with_name(f"{_mark(place)}{os.getpid()}.{uuid4().hex[:8]}.part")
    try:
        _begin(part, place, folder)
        yield part
    except OSError as error:
        _remove(part)
        if part.name not in str(error) and (error.errno is None or error.filename is not None):
            raise  # of another file; writing to an open one names none
        reason = error.strerror or str(error).replace(part.name, place.name)
        raise OSError(f"cannot write {place}: {reason}") from error
    except BaseException:
        _remove(part)
        raise
    _take(part, place, what)


@contextmanager
def claiming(place: str | Path, *, what: str = "file") -> Iterator[None]:
    """Let nobody else on this machine claim a place meanwhile, at which files grow under names of their own.

    Raises FileExistsError where somebody has claimed it, and what `replacing` raises where nothing can be written there.
    """
    place = check_place(place)
    mark = place.with_name(f"{_mark(place)}{os.getpid()}.{uuid4().hex[:8]}.part")
    try:
        _begin(mark, place, False)  # which removes what killed runs have left
        if any(path != mark for path, _ in _hidden(place)):
            raise FileExistsError(
                f"{place} is being written by another run: wait for its end, or choose another name for the {what}"
            )
        yield
    finally:
        _remove(mark)


def check_place(place: str | Path, *, folder: bool = False) -> Path:
    """Where a file or folder of that name really goes: where its links lead.

    Raises ValueError for what is no name, and OSError where something stands that a file, or folder, cannot replace.
    """
    if "\0" in str(place):
        raise ValueError(f"no file can be named {str(place)!r}: the name has a zero character in it")
    place = Path(os.path.realpath(place))
    try:
        mode = place.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return place
    except OSError as error:  # such as a name that is too long
        raise OSError(f"cannot write {place}: {error.strerror}") from error
    if stat.S_ISLNK(mode):
        raise OSError(f"{place} is a link that leads to itself: give another name")
    if stat.S_ISDIR(mode) and not folder:
        raise IsADirectoryError(f"{place} is a folder: give the name of a file in it")
    if not stat.S_ISDIR(mode) and (folder or not stat.S_ISREG(mode)):
        kind = "a file" if stat.S_ISREG(mode) else "a pipe or a device"
        raise FileExistsError(f"{place} is {kind}: give another name")
    return place


def _begin(part: Path, place: Path, folder: bool) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for leftover in _leftovers(place):
            _remove(leftover)
        part.mkdir() if folder else part.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"cannot write into the folder {place.parent}: {error.strerror}") from error


def _take(part: Path, place: Path, what: str) -> None:
    try:
        os.replace(part, place)
    except OSError as error:
        reason = "it is a folder now" if place.is_dir() else f"{error.strerror}; is it open in another program?"
        kept = place.with_name(f"{place.stem}.{uuid4().hex[:8]}{place.suffix}")
        try:
            os.replace(part, kept)
        except OSError:
            kept = part
        raise OSError(f"{place} cannot be replaced ({reason}); the {what} is kept as {kept}") from error


def _mark(place: Path) -> str:
    """How the hidden names begin under which this machine writes to a place, and to no other: all of its name counts."""
    machine = zlib.crc32(platform.node().encode())
    return f".{place.name[:NAME_LENGTH]}.{zlib.crc32(os.fsencode(place.name[NAME_LENGTH:]), machine):08x}-"


def _leftovers(place: Path) -> Iterator[Path]:
    """What earlier writers to this place on this machine have left, none of which is at work any more.

    Another machine may share the folder. Whether its writers are at work cannot be told from here, so theirs stay.
    """
    return (path for path, process in _hidden(place) if _is_gone(process, path))


def _hidden(place: Path) -> Iterator[tuple[Path, int]]:
    """The hidden files under which this machine writes to a place, and the process of each."""
    name = re.compile(re.escape(_mark(place)) + r"(\d+)\.[0-9a-f]{8}\.part")
    for path in list(place.parent.iterdir()):
        if match := name.fullmatch(path.name):
            yield path, int(match[1])


def _is_gone(process: int, path: Path) -> bool:
    """Whether the process that wrote `path` has ended, even if another has its number by now, as in a container."""
    try:
        running = psutil.Process(process)
        if running.status() == psutil.STATUS_ZOMBIE:
            return True
        return running.create_time() > path.lstat().st_mtime + CLOCK_SECONDS
    except (psutil.NoSuchProcess, OverflowError):
        return True
    except (psutil.AccessDenied, OSError):
        return False


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
