"""Before a release: `python -m tools.release check v1.2.3` holds tag, pyproject.toml and CHANGELOG.md against each other.

`python -m tools.release addresses v1.2.3` then writes the addresses of icon and banner into pyproject.toml, where the
registry reads them. The workflow that publishes calls both; neither result is committed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from .comfyui.env import PACK


def one(pattern: str, text: str) -> str:
    """What the only line that matches says; empty where there is none."""
    found = re.findall(pattern, text, re.MULTILINE)
    return found[0] if len(found) == 1 else ""


def problems(tag: str, folder: Path = PACK) -> list[str]:
    """What keeps a tag from being released, as sentences."""
    project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
    version = one(r'^version = "(.*)"$', project)
    newest = one(r"\A(?:(?!^## \[\d)[\s\S])*^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", changelog)
    unreleased = one(r"^## \[Unreleased\]\n([\s\S]*?)(?=^## |\Z)", changelog)
    said = []
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        said.append(f"the tag is {tag}; it must be v and three numbers, as v1.2.3")
    if tag != f"v{version}":
        said.append(f"the tag is {tag}, but pyproject.toml says version {version}")
    if newest != version:
        said.append(f"the newest dated section of CHANGELOG.md is {newest or 'missing'}, but the version is {version}")
    if unreleased.strip():
        said.append(f"CHANGELOG.md still has entries under Unreleased: move them to a section [{version}] with a date")
    if not repository(project):
        said.append("pyproject.toml has no Repository under [project.urls]")
    return said


def repository(project: str) -> str:
    return one(r'^Repository = "(https://[^"]+?)/?"$', project)


def with_addresses(project: str, tag: str) -> str:
    """The text of pyproject.toml with the addresses that icon and banner have at that tag."""
    return re.sub(r'^(Icon|Banner) = "(docs/.*)"$', rf'\1 = "{repository(project)}/raw/{tag}/\2"', project, flags=re.M)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    parser.add_argument("command", choices=["check", "addresses"])
    parser.add_argument("tag")
    args = parser.parse_args(arguments)
    said = problems(args.tag)
    if said:
        sys.exit("\n".join(f"error: {problem}" for problem in said))
    if args.command == "addresses":
        path = PACK / "pyproject.toml"
        path.write_text(with_addresses(path.read_text(encoding="utf-8"), args.tag), encoding="utf-8")


if __name__ == "__main__":
    main()
