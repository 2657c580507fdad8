"""The files around the code say one thing: requirements, constraints, project metadata, what is published."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

PACK = Path(__file__).parents[2]


def requirements(name):
    lines = [line.partition("#")[0].strip() for line in (PACK / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def project():
    if sys.version_info < (3, 11):
        pytest.skip("reading pyproject.toml needs Python 3.11")
    import tomllib

    return tomllib.loads((PACK / "pyproject.toml").read_text())


def test_project_metadata_and_requirements_file_agree():
    dependencies = [Requirement(line) for line in project()["project"]["dependencies"]]
    assert [d for d in dependencies if d.name != "comfyui-frontend-package"] == requirements("requirements.txt")


def test_what_is_optional_is_tested_in_the_same_versions():
    extras = project()["project"]["optional-dependencies"]
    assert extras.keys() == {"bench", "ray"}
    tested = {str(requirement) for requirement in requirements("requirements-test.txt")}
    assert {str(Requirement(line)) for lines in extras.values() for line in lines} <= tested


def test_metadata_is_what_the_registry_asks_for():
    data = project()
    assert "comfy" not in data["project"]["name"].lower()
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= data["tool"]["comfy"].keys()
    assert any(line.startswith("comfyui-frontend-package>=") for line in data["project"]["dependencies"])


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_requirement_has_one_tested_version_that_satisfies_it(python):
    environment = {**default_environment(), "python_version": python}
    pins = {}
    for pin in requirements("constraints.txt"):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
            (pins[pin.name],) = pin.specifier
    for name in ("requirements.txt", "requirements-run.txt", "requirements-test.txt"):
        for requirement in requirements(name):
            assert requirement.specifier.contains(pins[requirement.name].version), requirement


def test_the_published_archive_has_what_the_pack_needs_and_no_tools():
    """The registry's scanner flags processes and connections, which only tests and tools need."""
    lines = (PACK / ".comfyignore").read_text(encoding="utf-8").split()
    assert all(line.startswith("/") for line in lines), "without the slash, web/docs/ would match docs/ too"
    ignored = {line.strip("/") for line in lines}
    assert ignored >= {"tools", "tests", "docs", "output", ".ci", "run.sh", "test.sh", "run.bat", "test.bat"}
    needed = {"__init__.py", "nodes", "rolling_kv", "web", "locales", "workflows", "models", "requirements.txt"}
    assert not ignored & (needed | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"})


def test_the_command_line_is_installed_under_its_name():
    data = project()
    module, _, function = data["project"]["scripts"]["rolling-kv"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert data["tool"]["setuptools"]["package-data"]["rolling_kv"] == ["py.typed"]


def test_classifiers_name_the_pythons_that_are_tested():
    data = project()["project"]
    tested = (PACK / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ +python: \[(.*)\]$", tested, re.MULTILINE)
    named = [line.rpartition(" ")[2] for line in data["classifiers"] if "Python :: 3." in line]
    assert named == re.findall(r"[\d.]+", line) == ["3.10", "3.11", "3.12", "3.13"]
    assert data["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize(
    "command", [["check", "--output-format", "concise"], ["format", "--check"]], ids=lambda c: c[0]
)
def test_code_is_clean(command):
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    result = subprocess.run([ruff, *command, "--no-cache", PACK], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_commit_is_checked_by_the_version_of_ruff_that_the_tests_use():
    (pin,) = (pin for pin in requirements("constraints.txt") if pin.name == "ruff")
    hooks = (PACK / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"rev: v{next(iter(pin.specifier)).version}\n" in hooks
