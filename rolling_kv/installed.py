"""Whether the packages that the engine needs go together, asked before they are imported."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def check_installed(name: str = "diffusers") -> None:
    """Raise ImportError unless a package is installed, and what it needs in the versions that it needs.

    An installer that takes one requirement at a time can leave a package beside versions that it cannot work with.
    """
    remedy = (
        "Install what this pack needs, all at once:\n"
        f"  {sys.executable} -m pip install -r {Path(__file__).parents[1] / 'requirements.txt'}"
    )
    try:
        needs = [Requirement(line) for line in metadata.requires(name) or ()]
        for need in needs:
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            version = metadata.version(need.name)
            if not need.specifier.contains(version, prereleases=True):
                raise ImportError(f"{name} {metadata.version(name)} needs {need}, but {version} is installed. {remedy}")
    except metadata.PackageNotFoundError as missing:
        raise ImportError(f"the Python package {missing.name} is not installed. {remedy}") from missing
