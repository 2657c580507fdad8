"""Where a ComfyUI is, which Python it runs with, and what that Python lacks to run this pack."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

PACK = Path(__file__).resolve().parents[2]

TORCH_FAMILY = ("torch", "torchvision", "torchaudio")
"""Packages that belong together and to the machine's driver: an install for the pack never changes them."""

PROBE = """
import importlib.metadata, json, torch
versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
print(json.dumps({"versions": versions, "cuda": torch.cuda.is_available()}))
"""


class ComfyError(RuntimeError):
    """ComfyUI is there but cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class ComfyInstall:
    """A ComfyUI folder and the Python that runs it. `versions` maps lower-case package names to installed versions."""

    path: Path
    python: Path
    versions: dict[str, str]
    cuda: bool


def find_comfyui(pack: Path = PACK) -> Path | None:
    """The first of $COMFYUI_PATH, the ComfyUI whose custom_nodes holds the pack, and ~/ComfyUI; None without one.

    Raises ComfyError when $COMFYUI_PATH is set and holds no ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not _is_comfyui(Path(named)):
            raise ComfyError(f"COMFYUI_PATH is {named}, but there is no ComfyUI (main.py, nodes.py) in that folder.")
        return Path(named).resolve()
    candidates = [pack.parents[1]] if pack.parent.name == "custom_nodes" else []
    candidates.append(Path.home() / "ComfyUI")
    return next((path for path in candidates if _is_comfyui(path)), None)


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "nodes.py").is_file()


def find_python(comfyui: Path) -> Path | None:
    """The Python of a ComfyUI: $COMFYUI_PYTHON, its virtual environment, or the portable build's; None without one."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        if not Path(named).is_file():
            raise ComfyError(f"COMFYUI_PYTHON is {named}, but there is no such file.")
        return Path(named).absolute()
    environments = [comfyui / ".venv", comfyui / "venv"]
    candidates = [env / python for env in environments for python in ("bin/python", "Scripts/python.exe")]
    candidates += [folder / "python_embeded/python.exe" for folder in (comfyui, comfyui.parent)]
    return next((path for path in candidates if path.is_file()), None)


def probe(comfyui: Path, python: Path) -> ComfyInstall:
    """Ask a ComfyUI's Python what it has. Raises ComfyError when it cannot import torch."""
    result = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise ComfyError(
            f"ComfyUI at {comfyui} does not run with {python}: {reason}\n"
            "Install ComfyUI's own requirements there, or name its Python: COMFYUI_PYTHON=/path/to/python"
        )
    found = json.loads(result.stdout.splitlines()[-1])
    versions = {_normal(name): version for name, version in found["versions"].items()}
    return ComfyInstall(comfyui, python, versions, found["cuda"])


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def requirements_of(path: Path) -> list[str]:
    """The lines of a requirements file, without the torch family."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and _normal(Requirement(line).name) not in TORCH_FAMILY]


def missing_requirements(install: ComfyInstall, requirements: Path = PACK / "requirements.txt") -> list[str]:
    """The lines of a requirements file that an installation does not satisfy, without the torch family."""

    def satisfied(line: str) -> bool:
        requirement = Requirement(line)
        version = install.versions.get(_normal(requirement.name))
        return version is not None and requirement.specifier.contains(version, prereleases=True)

    return [line for line in requirements_of(requirements) if not satisfied(line)]


def install_missing(install: ComfyInstall, say=print) -> None:
    """Put what the pack needs and lacks into a ComfyUI's environment, leaving torch as it is.

    Raises ComfyError when pip is absent there or fails.
    """
    missing = missing_requirements(install)
    if not missing:
        return
    say(f"Installing into ComfyUI's environment ({install.python}): {', '.join(missing)}")
    pins = [f"{name}=={install.versions[name]}" for name in TORCH_FAMILY if name in install.versions]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins), encoding="utf-8")
        # All lines at once, so that pip looks for what goes with the packages that are there.
        lines = requirements_of(PACK / "requirements.txt")
        command = [install.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *lines]
        result = subprocess.run([*command, "-c", constraints], stdin=subprocess.DEVNULL)
    if result.returncode:
        raise ComfyError(
            f"pip could not install {', '.join(missing)} for ComfyUI at {install.path}. Install them by hand with\n"
            f"  {install.python} -m pip install -r {PACK / 'requirements.txt'}"
        )


def find_install() -> ComfyInstall | None:
    """The ComfyUI of this machine and its Python, or None without one. Raises ComfyError when it is unusable."""
    comfyui = find_comfyui()
    if comfyui is None:
        return None
    python = find_python(comfyui)
    if python is None:
        raise ComfyError(
            f"ComfyUI is at {comfyui}, but its Python is not in .venv, venv or python_embeded. "
            "Name it: COMFYUI_PYTHON=/path/to/python"
        )
    return probe(comfyui, python)
