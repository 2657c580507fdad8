"""The steps of the container, done without one in a clean folder: what it installs starts, is healthy, and makes a video."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from graphs import api_prompts, read_video

from tools.comfyui.client import ComfyClient, first_file
from tools.comfyui.env import PACK
from tools.comfyui.server import _free_port

DOCKERFILE = PACK / "docker/Dockerfile"
LEFT = ".venv", "venv", ".git", "models", "output", "input", "temp", "user", "custom_nodes"


def test_the_dockerfile_has_nothing_that_a_linter_minds():
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_image_is_made_by_the_steps_that_are_tried_here():
    steps = re.findall(
        r"^(?:RUN|ENTRYPOINT|HEALTHCHECK.*CMD) .*(docker/\w+\.\w+)", DOCKERFILE.read_text(), re.MULTILINE
    )
    assert steps == ["docker/install.sh", "docker/healthy.py", "docker/start.sh"]
    ignored = (PACK / ".dockerignore").read_text().split()
    assert not {"nodes", "rolling_kv", "web", "workflows", "models", "locales", "docker", "requirements.txt"} & set(
        ignored
    )


@pytest.fixture
def installed(install, tmp_path):
    """What install.sh makes of a ComfyUI that is there, with a Python that has what ComfyUI's has."""
    source, folder = tmp_path / "source", tmp_path / "ComfyUI"
    shutil.copytree(install.path, source, ignore=lambda path, _: LEFT if Path(path) == install.path else ())
    for name in ("models", "input", "output", "custom_nodes"):
        (source / name).mkdir()
        (source / name / "kept").touch()  # git has no empty folders
    git = ["git", "-C", source, "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q", "-b", "v0.27.0"], check=True)
    subprocess.run([*git, "add", "-A", "-f"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    subprocess.run([install.python, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    known = subprocess.check_output([install.python, "-c", "import torch; print(torch.__path__[0])"], text=True)
    (path,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (path / "known.pth").write_text(str(Path(known.strip()).parent))
    environment = dict(os.environ, COMFYUI_SOURCE=str(source), PYTHON=str(python), HF_HUB_OFFLINE="1")
    command = ["bash", PACK / "docker/install.sh", folder]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, environment


@pytest.mark.skipif(os.name == "nt", reason="the container is one of Linux")
def test_what_is_installed_starts_is_healthy_and_makes_a_video(install, installed, tmp_path):
    folder, environment = installed
    environment["PORT"] = str(_free_port())
    with (tmp_path / "log").open("wb") as log:
        options = [] if install.cuda else ["--cpu"]
        command = ["bash", PACK / "docker/start.sh", folder, *options, "--database-url", "sqlite:///:memory:"]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        healthy = [sys.executable, str(PACK / "docker/healthy.py")]
        until = time.monotonic() + 240
        while subprocess.run(healthy, env=environment, stderr=subprocess.DEVNULL).returncode:
            assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1)
        client = ComfyClient(f"http://127.0.0.1:{environment['PORT']}")
        prompt = api_prompts()["text_to_video"]
        video = read_video(client.view(first_file(client.run(prompt), ".mp4")))
        assert len(video.frames) > 16
    finally:
        server.terminate()
        server.wait(120)
