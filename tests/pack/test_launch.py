"""run.sh, test.sh and their twins for Windows, on a small copy of the project that needs no network."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from two_ends import next_file

from tools import launch
from tools.comfyui.env import PACK

SHELL = ["run.sh", "test.sh"]
BATCH = ["run.bat", "test.bat"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts and POSIX paths")

SAY = "import pathlib, sys; print('ARGUMENTS', sys.argv[1:], pathlib.Path.cwd().name)\n"
"""Stands in for the renderer and for pytest."""

VENV = """
import sys
if __name__ == "__main__":
    del sys.path[0]
    from venv import create
    create(sys.argv[-1], clear="--clear" in sys.argv, symlinks=True)
"""
"""`python -m venv`, found before the real one, without the seconds that it takes to put pip in."""

PIP = """
import pathlib, sys
given = [pathlib.Path(sys.argv[sys.argv.index(option) + 1]).read_text() for option in ("-r", "-c")]
sys.exit("no such package" if "missing" in given[0] else 0)
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts, whose requirements are already there and whose programs only say what they were given."""
    folder = tmp_path / "a project"
    (folder / "tools").mkdir(parents=True)
    for name in (*SHELL, "tools/launch.py"):
        shutil.copy(PACK / name, folder / name)
    for name in ("requirements.txt", "requirements-run.txt", "requirements-test.txt", "constraints.txt"):
        (folder / name).write_text("pip\n", encoding="utf-8")
    (folder / "tools" / "render.py").write_text(SAY, encoding="utf-8")
    for name, program in {"pytest": SAY, "venv": VENV, "pip": PIP}.items():
        (folder / f"{name}.py").write_text(program, encoding="utf-8")
    return folder


def bash(script, *arguments, path=None, **environment):
    environment = {**os.environ, **environment}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [shutil.which("bash"), script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@posix
def test_the_first_run_makes_the_environment_and_the_next_one_goes_straight_on(project):
    first = bash(project / "run.sh", "--output", "a b.mp4", PYTHON=sys.executable)
    assert first.returncode == 0, first.stderr
    assert [line.partition(" with")[0] for line in first.stdout.splitlines()] == [
        "Making .venv",
        "Installing requirements-run.txt into .venv (PyTorch is large: this can take minutes)",
        "ARGUMENTS ['--output', 'a b.mp4'] a project",
    ]
    again = bash(project / "run.sh", PYTHON="/nowhere/python")
    assert again.stdout == "ARGUMENTS [] a project\n", again.stderr

    tests = bash(project / "test.sh")
    assert "Installing requirements-test.txt" in tests.stdout
    whole = ["-c", "tests/pytest.ini", "tests", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert tests.stdout.endswith(f"ARGUMENTS {whole} a project\n"), tests.stderr
    some = bash(project / "test.sh", "tests/pack", "-k", "a or b")
    assert some.stdout == "ARGUMENTS ['-c', 'tests/pytest.ini', 'tests/pack', '-k', 'a or b'] a project\n"

    (project / "constraints.txt").write_text("pip>=1\n", encoding="utf-8")
    assert "Installing requirements-run.txt" in bash(project / "run.sh").stdout

    (project / "requirements-run.txt").write_text("missing\n", encoding="utf-8")
    failed = bash(project / "run.sh")
    assert failed.returncode == 1 and failed.stderr == "no such package\n" and "ARGUMENTS" not in failed.stdout
    assert "Installing" in bash(project / "run.sh").stdout, "what failed is tried again"


@posix
def test_a_python_that_does_not_fit_is_refused_with_advice(project):
    old = project / "python"
    old.write_text(f'#!/bin/sh\ncase "$2" in *"(3, 10)"*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    old.chmod(0o755)
    refused = bash(project / "run.sh", PYTHON=str(old))
    assert refused.returncode == 1
    assert f"No Python 3.10 to 3.13 with venv was found at PYTHON={old}." in refused.stderr
    assert "apt install python3 python3-venv" in refused.stderr
    assert not (project / ".venv").exists()


@posix
def test_without_any_python_the_script_says_what_to_install(project):
    tools = project / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname"))
    result = bash(project / "test.sh", path=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "Install Python 3.10 to 3.13" in result.stderr


def test_a_python_too_old_for_the_project_can_read_the_launcher():
    ast.parse((PACK / "tools" / "launch.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    imported = {
        name.name for node in ast.walk(ast.parse((PACK / "tools" / "launch.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) for name in node.names
    }  # fmt: skip
    assert imported <= set(sys.stdlib_module_names)


def test_the_portable_builds_python_is_found_beside_and_in_comfyui(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    comfyui = tmp_path / "ComfyUI"
    monkeypatch.setattr(launch, "PACK", comfyui / "custom_nodes" / "rolling-kv")
    monkeypatch.setattr(launch, "WINDOWS", True)
    assert [[str(tmp_path / "python_embeded" / "python.exe")], [str(comfyui / "python_embeded" / "python.exe")]] == (
        launch.candidates()[-2:]
    )
    assert ["py", "-3.13"] in launch.candidates()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "elsewhere" / "ComfyUI"))
    assert [str(tmp_path / "elsewhere" / "python_embeded" / "python.exe")] in launch.candidates()


def test_a_python_with_pip_but_without_venv_is_the_last_choice_and_gets_virtualenv(monkeypatch, tmp_path):
    """The portable build's Python is one of these."""
    commands = []
    venv = tmp_path / ".venv"
    monkeypatch.setattr(launch, "VENV", venv)
    monkeypatch.setattr(launch, "candidates", lambda: [["old"], ["portable"], ["whole"]])
    monkeypatch.setattr(launch, "run", commands.append)
    monkeypatch.setattr(
        launch.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "Python 3.12.9\n")
    )

    def answers(python, code):
        able = {"portable": {launch.FITS, launch.HAS_PIP}, "whole": {launch.FITS, launch.HAS_VENV, launch.HAS_PIP}}
        return code in able.get(python[0], set())

    monkeypatch.setattr(launch, "answers", answers)
    assert launch.find_python() == ["whole"]
    launch.make_venv()
    assert commands.pop() == ["whole", "-m", "venv", "--clear", str(venv)]
    monkeypatch.setattr(launch, "candidates", lambda: [["old"], ["portable"]])
    launch.make_venv()
    get, make = commands
    assert get[:4] == ["portable", "-m", "pip", "install"] and "--target" in get and get[-1] == "virtualenv"
    assert make[:3] == ["portable", "-c", launch.VIRTUALENV] and make[4] == str(venv)


@pytest.mark.parametrize("name", BATCH)
def test_batch_files_hold_together(name):
    """Read as cmd.exe reads them: every label that is called exists, and nothing runs on into a subroutine."""
    source = (PACK / name).read_text(encoding="ascii")
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    labels = {line[1:] for line in lines if line.startswith(":")}
    assert set(re.findall(r"(?:goto|call :?) ?:?(\w+)", source)) == labels == {"try", "none"}
    for label in labels:
        before = lines[lines.index(f":{label}") - 1]
        assert before.startswith("exit /b"), f"the line before :{label} falls through into it"
    assert lines[-1].startswith("exit /b")
    assert not re.search(r"^\s*(if|for)\b.*\($", source, re.MULTILINE), "in a block, %variables% are read too early"
    assert all(line.count('"') % 2 == 0 for line in lines)
    assert f"%LAUNCHER% tools\\launch.py {name.partition('.')[0]} %*" in lines
    (again,) = re.findall(r"sys\.exit\(sys\.version_info < \(3, 7\)\)", source)
    assert again in (PACK / name.replace(".bat", ".sh")).read_text(encoding="utf-8")


def test_batch_files_have_the_line_ends_of_windows():
    """cmd.exe loses labels in files with the line ends of Unix; git makes them on every machine."""
    attributes = (PACK / ".gitattributes").read_text(encoding="utf-8").splitlines()
    assert "*.bat text eol=crlf" in attributes and "*.sh text eol=lf" in attributes
    for name in BATCH:
        content = (PACK / name).read_bytes()
        assert content.count(b"\r\n") == content.count(b"\n") > 0
    for name in SHELL:
        assert b"\r" not in (PACK / name).read_bytes()


@pytest.mark.parametrize(
    "live, order",
    [(True, "live/a live/b web/a pack/a engine/b engine/a"), (False, "engine/a engine/b pack/a web/a live/b live/a")],
)
def test_one_worker_has_the_files_of_servers_and_each_helps_the_other_from_the_end(live, order):
    left, taken = ["engine/a", "engine/b", "live/a", "live/b", "pack/a", "web/a"], []
    while left:
        taken.append(next_file(left, live))
        left.remove(taken[-1])
    assert taken == order.split()
