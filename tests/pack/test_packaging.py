"""The files around the code say one thing: requirements, constraints, project metadata, what is published."""

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


def test_what_starts_processes_or_opens_connections_is_not_published():
    ignored = (PACK / ".comfyignore").read_text().split()
    assert {"/tools/", "/tests/", "/docs/", "/run.sh", "/test.sh"} <= set(ignored)
    published = [PACK / "__init__.py", *(PACK / "nodes").rglob("*.py"), *(PACK / "rolling_kv").rglob("*.py")]
    modules = "subprocess|socket|urllib|http|requests"
    forbidden = re.compile(rf"^\s*(import|from) ({modules})\b|(?<![.\w])(eval|exec)\(", re.MULTILINE)
    for path in published:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path


def test_code_is_clean():
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    result = subprocess.run([ruff, "check", "--no-cache", PACK], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
