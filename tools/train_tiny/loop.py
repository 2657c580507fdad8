"""One training loop for all parts: AdamW, warm-up and cosine, averaged weights, a log, and a checkpoint to resume from."""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

from rolling_kv.atomic import replacing

WORK = Path(".train")
"""Checkpoints and logs, below the current folder."""
MUON_RATE = 10.0
WAIT = timedelta(hours=6)
"""How long a worker waits for another one's part."""


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[int, torch.Generator, nn.Module], torch.Tensor],
    steps: int,
    rate: float,
    average: float = 0.998,
    matrices: list[nn.Parameter] | None = None,
    evaluate: Callable[[nn.Module], str] | None = None,
    save_every: int = 100,
    lessons: int = 0,
    together: bool = False,
) -> nn.Module:
    """Minimise `loss(step, generator, averaged)` over `module` and return the exponentially averaged module.

    The generator is seeded by the step and by `lessons`, so a resumed run sees the draws that an uninterrupted one would
    have seen. together: under `torchrun` every worker draws a batch of its own and the gradients are averaged: on a CPU, several
    processes with one thread each are faster than one process with several threads.
    """
    rank, workers = join_workers() if together else (0, 1)
    WORK.mkdir(exist_ok=True)
    path = WORK / f"{name}.pt"
    averaged = copy.deepcopy(module).eval().requires_grad_(False)
    optimizers = make_optimizers(module, rate, matrices or [])
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        averaged.load_state_dict(saved["averaged"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        start = saved["step"]
    log = Log(WORK / f"{name}.log")
    total, since = 0.0, time.time()
    for step in range(start, steps):
        part = min(1, (step + 1) / 100) * (0.5 + 0.49 * math.cos(math.pi * step / steps))
        for optimizer, full in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = full * part
        generator = torch.Generator().manual_seed(step * 7919 + 17 + 1_000_003 * rank + 15_485_863 * lessons)
        value = loss(step, generator, averaged)
        module.zero_grad(set_to_none=True)
        value.backward()
        if workers > 1:
            average_gradients(module, workers)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        # A short memory at first, so that the random start is forgotten.
        keep = min(average, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), module.parameters()):
                if now.requires_grad:
                    mean.lerp_(now, 1 - keep)
        total += value.item()
        if rank == 0 and (step + 1) % 50 == 0:
            log(f"step {step + 1}/{steps} loss {total / 50:.5f} {(time.time() - since) / 50:.2f} s/step")
            total, since = 0.0, time.time()
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps):
            if evaluate is not None:
                log(f"step {step + 1}/{steps} {evaluate(averaged)}")
            state = {"module": module.state_dict(), "averaged": averaged.state_dict()}
            save(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "step": step + 1}, path)
            since = time.time()
    return averaged


def autocast() -> torch.autocast:
    """bfloat16 where this CPU computes in it; elsewhere it would be many times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024), of convolutions too, as matrices of their outputs.

    torch.optim.Muon computes in bfloat16, which is slow where the CPU has no instructions for it, and takes no convolutions.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["momentum"])
                    update = parameter.grad.lerp(mean, group["momentum"]).flatten(1)
                    alike.setdefault(update.shape, []).append((parameter, update))
            for shape, pairs in alike.items():
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                # As large as the steps of AdamW (Liu et al. 2025).
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for (parameter, _), update in zip(pairs, updates):
                    parameter.add_(update.view(parameter.shape), alpha=-rate)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrices to [N, rows, columns], by four steps of a Newton-Schulz iteration.

    The steps are polynomials of the smaller Gram matrix, so only their product is multiplied with the matrices.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    gram = x @ x.transpose(1, 2)
    product = None
    for step in range(4):
        power = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        power.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = power if product is None else power @ product
        if step < 3:
            gram = power @ gram @ power
    x = product @ x
    return x.transpose(1, 2) if tall else x


def make_optimizers(module: nn.Module, rate: float, matrices: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    taken = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in taken]
    optimizers = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.0)]
    return optimizers + ([Muon(matrices, MUON_RATE * rate)] if matrices else [])


def part_parser(description: str, steps: object) -> argparse.ArgumentParser:
    """The options that every part of the training has. steps: how many it takes where none are given, for people."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"default: {steps}")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def join_workers() -> tuple[int, int]:
    """This process's number and the number of processes, (0, 1) without `torchrun`."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=WAIT)
    return distributed.get_rank(), distributed.get_world_size()


def side_by_side(*parts: Callable[[], object]) -> None:
    """Run parts that do not need each other: under `torchrun` each by one worker, otherwise one after the other."""
    rank, workers = join_workers()
    for part in parts[rank::workers]:
        part()
    if workers > 1:
        distributed.barrier()


def average_gradients(module: nn.Module, workers: int) -> None:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.div_(workers).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def save(values: dict, path: Path) -> None:
    """Write `values` so that an interruption leaves the old file."""
    with replacing(path) as file:
        torch.save(values, file)


class Log:
    """Prints lines and appends them to a file, with the time of day."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
