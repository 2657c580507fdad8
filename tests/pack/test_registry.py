"""What the Comfy registry is given: by comfy-cli where it is installed, and the check that comes before."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.comfyui.env import PACK
from tools.release import problems, with_addresses

COMFY = shutil.which("comfy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_comfy = pytest.mark.skipif(COMFY is None or shutil.which("git") is None, reason="needs comfy-cli and git")

CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n### Added\n\n- This.\n\n## [1.2.2] - 2026-01-01\n"
)
PROJECT = """[project]
version = "1.2.3"
[project.urls]
Repository = "https://example.org/somebody/rolling-kv"
[tool.comfy]
Icon = "docs/images/icon.png"
Banner = "docs/images/banner.png"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with the files of this one as they are now; comfy-cli packs what git knows."""
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PACK, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is not a git repository")
    folder = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (PACK / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACK / name, folder / name)
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    return folder


def comfy(folder, *arguments):
    environment = {**os.environ, "DO_NOT_TRACK": "1", "HOME": str(folder.parent), "COLUMNS": "200"}
    command = [COMFY, "--skip-prompt", "node", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    return said


@needs_comfy
def test_the_registry_finds_nothing_to_warn_of(checkout):
    said = comfy(checkout, "validate")
    assert not re.search("warning|invalid|error|S102|S307|E702", said, re.IGNORECASE), said


@needs_comfy
def test_the_archive_holds_what_the_pack_needs_and_nothing_else(checkout):
    comfy(checkout, "pack")
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    (checkout / "node.zip").unlink()
    tops = {"nodes", "rolling_kv", "web", "locales", "workflows", "models"}
    assert {name.partition("/")[0] for name in packed} == tops | {
        "__init__.py", "requirements.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".comfyignore"
    }  # fmt: skip
    for top in tops:
        files = {path.relative_to(checkout).as_posix() for path in (checkout / top).rglob("*") if path.is_file()}
        assert files <= packed, files - packed


def test_the_security_rules_of_the_registry_find_nothing():
    """The same rules that comfy-cli asks ruff for, where comfy-cli is not installed."""
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    if ruff is None:
        pytest.skip("needs ruff")
    command = [ruff, "check", "--no-cache", "--isolated", "--select", "S102,S307,E702", PACK]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def release(folder, project=PROJECT, changelog=CHANGELOG, tag="v1.2.3"):
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (folder / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    return problems(tag, folder)


def test_a_release_whose_tag_version_and_changelog_agree_may_go(tmp_path):
    assert release(tmp_path) == []


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"tag": "v1.2.4"}, "tag is v1.2.4, but pyproject.toml says version 1.2.3"),
        ({"tag": "1.2.3"}, "must be v and three numbers"),
        ({"project": PROJECT.replace("1.2.3", "1.2.4"), "tag": "v1.2.4"}, "section of CHANGELOG.md is 1.2.3"),
        ({"changelog": CHANGELOG.replace(" - 2026-01-31", "")}, "section of CHANGELOG.md is missing"),
        ({"changelog": CHANGELOG.replace("Unreleased]\n", "Unreleased]\n\n- More.\n")}, "still has entries"),
        ({"changelog": CHANGELOG.replace("1.2.3]", "1.2.9]")}, "section of CHANGELOG.md is 1.2.9"),
        ({"project": PROJECT.replace("Repository", "Home")}, "no Repository"),
    ],
)
def test_a_release_that_disagrees_is_held_back(tmp_path, changes, told):
    assert any(told in problem for problem in release(tmp_path, **changes))


def test_the_files_of_the_project_are_ready_but_for_what_only_a_release_decides():
    version = re.findall(r'^version = "(.*)"$', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[0]
    for problem in problems(f"v{version}"):
        assert "Unreleased" in problem or "Repository" in problem, problem


def test_icon_and_banner_get_addresses_and_have_the_shapes_that_the_registry_asks_for():
    text = with_addresses(PROJECT, "v1.2.3")
    assert 'Icon = "https://example.org/somebody/rolling-kv/raw/v1.2.3/docs/images/icon.png"' in text
    assert 'Banner = "https://example.org/somebody/rolling-kv/raw/v1.2.3/docs/images/banner.png"' in text
    project = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    sizes = {}
    for name, path in re.findall(r'^(Icon|Banner) = "(.*)"$', project, re.MULTILINE):
        header = (PACK / path).read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        sizes[name] = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    assert sizes["Icon"] == (400, 400)
    assert sizes["Banner"][0] * 9 == sizes["Banner"][1] * 21
