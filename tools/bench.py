"""`python -m rolling_kv bench` and, where there is a ComfyUI, its own SamplerARVideo on the same weights and noise.

    python -m tools.bench [--comfyui DIR] [any argument of `python -m rolling_kv bench`]

ComfyUI runs in a process of its own, in its own Python, and takes turns with the other methods. It is looked for as
`tools.comfy_env` does: $COMFYUI_PATH, above custom_nodes, ~/ComfyUI. To measure everything with one and the same
torch, run this with ComfyUI's Python. This part is no part of the pack that is published, which starts no process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from rolling_kv.bench.cli import add_arguments, run
from rolling_kv.bench.methods import Method

from .comfy_env import PACK, ComfyError, ComfyInstall, find_install


class ComfyUISampler(Method):
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
            [self.install.python, "-m", "tools.bench_comfyui"], cwd=PACK, stdin=subprocess.PIPE,
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
            raise ComfyError(f"ComfyUI at {self.install.path} could not be measured; its last words were:\n{reason}")
        self.answer = json.loads(line)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", metavar="DIR", help="folder of the ComfyUI to measure (default: looked for)")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    if args.comfyui:
        os.environ["COMFYUI_PATH"] = args.comfyui
    try:
        install = find_install()
        with tempfile.TemporaryDirectory() as folder:
            if install is None:
                run(args, notes=["(d) was not measured: no ComfyUI was found. Name one with --comfyui DIR."])
            elif args.device == "cpu" and args.dtype in ("float16", "bfloat16"):
                run(args, notes=["(d) was not measured: on a CPU, ComfyUI's sampler runs in float32 only."])
            else:
                sampler = type("ComfyUISampler", (ComfyUISampler,), {"install": install, "folder": Path(folder)})
                sampler.note += f"; torch {install.versions['torch']}"
                run(args, [sampler])
    except (ValueError, OSError, ComfyError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("cancelled")


if __name__ == "__main__":
    main()
