"""(d) of `python -m rolling_kv bench`: ComfyUI's own SamplerARVideo on the same weights, prompt and noise.

ComfyUI runs in a process of its own, in its own Python, and takes turns with the other methods. To measure everything
with one and the same torch, run the benchmark with ComfyUI's Python. No part of the pack that is published, which
starts no process.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rolling_kv.bench.chunks.contenders import Contender
from rolling_kv.bench.chunks.experiment import Workload
from rolling_kv.bench.figures import BenchError

from .env import PACK, ComfyError, ComfyInstall, find_install

PROBE = """
import sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.samplers
comfy.samplers.ksampler("ar_video", {})
"""


@contextmanager
def find_sampler(workload: Workload) -> Iterator[tuple[type[ComfyUISampler] | None, str]]:
    """The method for this workload, or None and why it cannot be measured. Looks where `env.find_comfyui` does."""
    try:
        install = find_install()
    except ComfyError as error:
        yield None, str(error)
        return
    if install is None:
        yield None, "no ComfyUI was found; name one in COMFYUI_PATH"
    elif workload.device.type == "cpu" and workload.dtype != torch.float32:
        yield None, "on a CPU, ComfyUI's sampler runs in float32 only"
    elif lacking := _what_is_lacking(install):
        yield None, lacking
    else:
        with tempfile.TemporaryDirectory() as folder:
            note = f"{ComfyUISampler.note}; torch {install.versions['torch']}"
            known = {"install": install, "folder": Path(folder), "note": note}
            yield type("ComfyUISampler", (ComfyUISampler,), known), ""


def _what_is_lacking(install: ComfyInstall) -> str:
    """Why this ComfyUI cannot sample chunk by chunk; empty if it can."""
    result = subprocess.run(
        [install.python, "-c", PROBE], cwd=install.path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        return f"ComfyUI at {install.path} has no SamplerARVideo, or does not start: {reason}"
    return ""


class ComfyUISampler(Contender):
    """(d) ComfyUI's CausalWanModel, loaded, managed and sampled by ComfyUI, with PyTorch's attention.

    Subclasses set `install`, and the folder that the weights are handed over in.
    """

    letter = "d"
    title = "ComfyUI SamplerARVideo"
    note = "in a process of its own; keys of every frame are kept, for the whole length from the start"
    install: ComfyInstall
    folder: Path
    memory = False

    def __init__(self, workload, weights):
        super().__init__(workload, weights)
        self.answer: dict = {}
        self.latents = self.folder / "latents.safetensors"
        weights_file, prompt_file = self.folder / "weights.safetensors", self.folder / "prompt.safetensors"
        if not weights_file.exists():
            save_file(weights, weights_file)
            save_file({"prompt": workload.prompt.float().cpu()}, prompt_file)
        self.log = (self.folder / "log.txt").open("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [self.install.python, "-m", "tools.comfyui.sampler_process"], cwd=PACK, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log, text=True, encoding="utf-8",
        )  # fmt: skip
        try:
            self._ask(
                comfyui=str(self.install.path), weights=str(weights_file), prompt=str(prompt_file),
                latents=str(self.latents), device=str(workload.device), seed=workload.seed, chunks=workload.chunks,
                dtype=str(workload.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
                sigmas=[step.sigma.item() for step in workload.steps] + [0.0], chunk_shape=workload.chunk_shape,
                memory=self.memory,
            )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def chunk(self, index):
        # Later ones have another window than ours, so there is nothing to compare them with.
        wanted = self.workload.frames_used(index) == (index + 1) * self.workload.chunk_shape[2]
        self._ask(latents=wanted)
        return load_file(self.latents)["latents"].to(self.workload.device) if wanted else None

    @property
    def kv_bytes(self):
        return self.answer["kv_bytes"]

    @property
    def peak_bytes(self):
        return self.answer["peak_bytes"]

    @classmethod
    def follow_memory(cls, workload, weights):
        method = type(cls.__name__, (cls,), {"memory": True})(workload, weights)
        try:
            peaks = []
            for index in range(workload.chunks):
                method.chunk(index)
                peaks.append(method.peak_bytes)
            return peaks
        finally:
            method.close()

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _ask(self, **order) -> None:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            reason = "\n".join(self.log.read().strip().splitlines()[-5:])
            raise BenchError(f"ComfyUI at {self.install.path} could not be measured; its last words were:\n{reason}")
        self.answer = json.loads(line)
