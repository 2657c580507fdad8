"""A headless ComfyUI server of one's own, with this pack and no other, that leaves the user's ComfyUI folder alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .client import ComfyClient
from .env import PACK, ComfyError, ComfyInstall

START_SECONDS = 300
SEARCHED = (
    "custom_nodes", "models/diffusion_models", "models/text_encoders", "models/vae", "models/loras", "models/diffusers",
    "models/vae_approx",
)  # fmt: skip
"""Folders of a server's own that it searches besides those of the ComfyUI installation."""


class ComfyServer:
    """A context manager: the server runs inside the `with` and is gone, with its temporary folder, after it.

    options: further arguments of ComfyUI's main.py. environment: variables to set for the server's process. packs: the
    node packs to load, folders by name. Output, input (with ComfyUI's example image), temporary and user files lie
    below `folder`, and so do empty model folders, searched besides ComfyUI's own.
    """

    def __init__(self, install: ComfyInstall, options=(), environment=None, packs=None):
        self.install = install
        self.options = options
        self.environment = environment or {}
        self.packs = packs or {"rolling-kv": PACK}

    def __enter__(self) -> ComfyServer:
        self.folder = Path(tempfile.mkdtemp(prefix="rolling-kv-comfyui-"))
        self.process = None
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def log(self) -> str:
        """Everything that the server has printed, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.folder / "server.log").read_text(encoding="utf-8", errors="replace"))

    def _start(self) -> None:
        for name in ("output", "input", "temp", "user/default", *SEARCHED):
            (self.folder / name).mkdir(parents=True)
        example = self.install.path / "input" / "example.png"
        if example.is_file():
            shutil.copy(example, self.folder / "input")
        settings = {"Comfy.TutorialCompleted": True}
        (self.folder / "user/default/comfy.settings.json").write_text(json.dumps(settings), encoding="utf-8")

        port = _free_port()
        self.client = ComfyClient(f"http://127.0.0.1:{port}")
        names = [self._make_visible(name, pack) for name, pack in self.packs.items()]
        search_paths = self.folder / "search_paths.yaml"  # JSON is YAML
        search_paths.write_text(json.dumps({"own": {Path(name).name: str(self.folder / name) for name in SEARCHED}}))
        command = [self.install.python, "main.py", "--port", port, "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *names]
        command += ["--extra-model-paths-config", search_paths, "--database-url", "sqlite:///:memory:"]
        for kind in ("output", "input", "temp", "user"):
            command += [f"--{kind}-directory", self.folder / kind]
        command += [] if self.install.cuda else ["--cpu"]
        command += self.options
        with (self.folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.install.path,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.client.alive():
            if self.process.poll() is not None:
                raise self._not_started("stopped while starting")
            if time.monotonic() > deadline:
                raise self._not_started(f"did not start in {START_SECONDS} s")
            time.sleep(0.5)

    def _not_started(self, what: str) -> ComfyError:
        return ComfyError(f"ComfyUI at {self.install.path} {what}. The end of its log:\n{self.log[-3000:]}")

    def _make_visible(self, name: str, pack: Path) -> str:
        """The name to whitelist for a pack. One outside of the ComfyUI's custom_nodes is linked into `folder`."""
        installed = self.install.path / "custom_nodes"
        if pack.parent == installed:
            return pack.name
        if (installed / name).exists():
            name = f"{name}-linked"
        link = self.folder / "custom_nodes" / name
        try:
            link.symlink_to(pack, target_is_directory=True)
        except OSError:  # Windows lets only some users make links
            shutil.copytree(pack, link, ignore=shutil.ignore_patterns(".*", "output", "tests"))
        return name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
