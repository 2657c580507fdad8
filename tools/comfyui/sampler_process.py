"""ComfyUI's SamplerARVideo, chunk by chunk on demand. Run by `sampler` in ComfyUI's own Python; stdin drives it.

The first line is a JSON object (see `main`). Then every line asks for one more chunk, and is answered by a JSON line on
stdout once the chunk is done. The model, its loading and its sampling are ComfyUI's, untouched: two hooks of torch on
the diffusion model count its passes, and hold the first one of each chunk until it is asked for.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rolling_kv.bench.chunks.noise import draw_noise
from rolling_kv.bench.gauges import TensorBytes, storage_bytes


class Conductor:
    """Lets one chunk run for each line of `orders`, and reports it on `answers`."""

    def __init__(self, orders, answers, passes: int, latents: Path, tensors: TensorBytes | None, cuda: bool):
        self.orders = orders
        self.answers = answers
        self.passes = passes  # per chunk: the steps and the context pass
        self.latents = latents
        self.tensors = tensors
        self.cuda = cuda
        self.done = 0
        self.clean: torch.Tensor | None = None
        self.wants_latents = False

    def before_pass(self, module, args, kwargs):
        if self.done % self.passes:
            return
        order = self.orders.readline()
        if not order:
            sys.exit("no more chunks are wanted")
        self.wants_latents = json.loads(order)["latents"]
        if self.tensors:
            self.tensors.restart()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def after_pass(self, module, args, kwargs, output):
        self.done += 1
        if self.done % self.passes:
            return
        answer = {"peak_bytes": self.tensors.peak if self.tensors else None}
        if self.cuda:
            torch.cuda.synchronize()
            answer["peak_bytes"] = torch.cuda.max_memory_allocated()
        caches = kwargs["transformer_options"]["ar_state"]["kv_caches"]
        answer["kv_bytes"] = storage_bytes(tensor for cache in caches for tensor in (cache["k"], cache["v"]))
        if self.wants_latents:
            save_file({"latents": self.clean.contiguous()}, self.latents)
        self.say(answer)

    def after_step(self, step, denoised, x, total):
        self.clean = denoised

    def say(self, answer: dict) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # ComfyUI prints, too
    order = json.loads(sys.stdin.readline())
    cuda = order["device"].startswith("cuda")
    torch.set_num_threads(order["threads"])
    sys.path.insert(0, order["comfyui"])
    sys.argv = ["main.py", "--use-pytorch-cross-attention", *([] if cuda else ["--cpu"])]

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy.sample
    import comfy.samplers
    import comfy.sd

    files = load_file(order["prompt"])
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    options = {"dtype": getattr(torch, order["dtype"])}
    model = comfy.sd.load_diffusion_model_state_dict(load_file(order["weights"]), options, metadata)
    weights = storage_bytes(model.model.diffusion_model.parameters())
    tensors = TensorBytes(weights) if order["memory"] else None
    passes = len(order["sigmas"])  # the steps, and the context pass in the place of the final zero
    conductor = Conductor(sys.stdin, answers, passes, Path(order["latents"]), tensors, cuda)
    network = model.model.diffusion_model
    network.register_forward_pre_hook(conductor.before_pass, with_kwargs=True)
    network.register_forward_hook(conductor.after_pass, with_kwargs=True)

    shape = tuple(order["chunk_shape"])
    noise = [draw_noise(order["seed"], chunk, 0, shape, order["device"]).cpu() for chunk in range(order["chunks"])]
    noise = torch.cat(noise, dim=2)
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": shape[2]})
    conditioning = [[files["prompt"], {}]]
    conductor.say({"torch": torch.__version__, "model": type(model.model).__name__})
    with torch.inference_mode(), tensors or nullcontext():
        comfy.sample.sample_custom(
            model, noise, 1.0, sampler, torch.tensor(order["sigmas"]), conditioning, conditioning,
            torch.zeros_like(noise), callback=conductor.after_step, disable_pbar=True, seed=order["seed"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
