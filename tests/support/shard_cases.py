"""Videos that several processes make together, and the same ones by one process.

Run as a script, it starts the processes, once it has imported what all of them need.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.wan.offloaded import offload_blocks
from rolling_kv.wan.shards import HeadShards

SIDE = 64  # pixels: 16 tokens a frame
FEW = SamplingConfig(denoising_steps=(1000, 500))
WINDOW = CacheConfig(window=6)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all frames": {"cache": CacheConfig(window="all")},
    "sink": {"cache": CacheConfig(window=7, sink=1)},
    "positions of the window": {"cache": CacheConfig(window=7, sink=1, positions="window")},
    "average of the sink": {"cache": CacheConfig(window=9, sink=3, leaving="ema")},
    "memory": {"cache": CacheConfig(window=9, sink=1, leaving="memory", positions="window", span=12)},
    "guidance": {"sampling": replace(FEW, guidance_scale=2.0)},
    "exact": {"execution": ExecutionConfig(exact=True)},
    "int8": {"cache": replace(WINDOW, storage="int8")},
    "float8": {"cache": replace(WINDOW, storage="float8")},
    "offload": {"cache": replace(WINDOW, offload=True)},
    "recached": {"switch": "causal"},
    "recached at once": {"switch": "joint"},
    "flush": {"switch": "flush"},
    "cut": {"switch": "cut"},
    "given frame": {"given": 1},
    "timestep a frame": {"given": 1, "sampling": replace(FEW, given_frame="in chunk")},
    "two videos": {"batch": 2},
    "weights in CPU memory": {"aside": True},
    "recomputed": {"cache": CacheConfig(window=6, sink=1, context="recomputed")},
    "sinks of shots": {"cache": CacheConfig(window=9, sink=1, shot_sink=True), "switch": "cut"},
    "many steps": {"sampling": SamplingConfig(sampler="unipc", num_inference_steps=3, guidance_scale=2.0)},
    "made anew": {"anew": 0.5},
    "rolling sampler": {"sampling": replace(FEW, sampler="rolling"), "cache": CacheConfig(window=9, sink=3)},
}


def prompts(transformer) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 8, transformer.config.text_dim, generator=generator) for _ in range(3)]


def made(transformer, shards: HeadShards | None, case: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
    """The latents of a case, the bytes of the cache, and those that were sent."""
    case = dict(case)
    sampling, cache, switch = case.pop("sampling", FEW), case.pop("cache", WINDOW), case.pop("switch", None)
    given, batch, anew = case.pop("given", 0), case.get("batch", 1), case.pop("anew", None)
    if case.pop("aside", False):
        transformer = deepcopy(transformer)
        offload_blocks(transformer, "cpu")
    model = CausalModel(transformer, ModelPreset("cases", sampling=sampling, cache=cache))
    first, second, negative = prompts(transformer)
    before = shards.sent if shards else 0
    session = RollingSession(model, first, height=SIDE, width=SIDE, negative=negative, shards=shards, **case)
    with session:
        latents = torch.randn(batch, 16, 9, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(5))
        if given:
            session.prefill(latents[:, :, :given])
        for _ in session.generate(3, seed=1, **({} if anew is None else {"source": latents, "strength": anew})):
            pass
        if switch:
            session.set_prompt(second, negative, switch=switch)
        for _ in session.generate(3, seed=1):
            pass
        held = sum(session.cache_bytes)
    return session.state.latents(), held, (shards.sent - before if shards else 0)


def refuses_other_seeds(transformer, shards: HeadShards) -> bool:
    """Whether this process is told that each has a seed of its own."""
    model = CausalModel(transformer, ModelPreset("cases", sampling=FEW, cache=WINDOW))
    with RollingSession(model, prompts(transformer)[0], height=SIDE, width=SIDE, shards=shards) as session:
        try:
            next(session.generate(1, seed=shards.rank))
        except ValueError as error:
            return "same seed" in str(error)
    return False


def refuses_diffusers(transformer, shards: HeadShards) -> bool:
    """Whether this process is told so where diffusers shares the passes out by itself, before a cache is attached and after."""
    said = []
    for after in (False, True):
        shared = deepcopy(transformer)
        model = CausalModel(shared, ModelPreset("cases", sampling=FEW, cache=WINDOW))
        config = ContextParallelConfig(ulysses_degree=shards.ranks)
        on_one = mock.patch.object(torch.accelerator, "device_count", lambda: 1)  # diffusers divides by it, on CPUs too
        try:
            if not after:
                with on_one:
                    shared.enable_parallelism(config=config)
            with RollingSession(model, prompts(shared)[0], height=SIDE, width=SIDE) as session:
                if after:
                    with on_one:
                        shared.enable_parallelism(config=config)
                next(session.generate(1, seed=1))
        except ValueError as error:
            said.append(str(error))
    return len(said) == 2 and all("diffusers' own parallelism" in text for text in said)


def make_all(rank: int, ranks: int, weights: str, out: str) -> None:
    """Make every case with so many processes, of which this is one, and in the first one alone; tell what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(f"{out}.meeting").as_uri(), rank=rank, world_size=ranks)
    shards = HeadShards()
    transformer = torch.load(weights, weights_only=False)
    told: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        shared, held, sent = made(transformer, shards, case)
        everywhere = [torch.empty_like(shared) for _ in range(shards.ranks)]
        dist.all_gather(everywhere, shared)
        alone, whole, _ = made(transformer, None, case) if shards.first else (shared, held, 0)
        told[name] = {
            "error": float((shared - alone).abs().max()),
            "size": float(alone.abs().max()),
            "same": all(torch.equal(shared, other) for other in everywhere),
            "held": held,
            "whole": whole,
            "sent": sent,
        }
    told["seeds"] = {"refused": shards._told(int(refuses_other_seeds(transformer, shards)))}
    told["diffusers"] = {"refused": shards._told(int(refuses_diffusers(transformer, shards)))}
    if shards.first:
        Path(out).write_text(json.dumps(told))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def main(ranks: str, weights: str, out: str) -> None:
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    processes = [context.Process(target=make_all, args=(rank, int(ranks), weights, out)) for rank in range(int(ranks))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main(*sys.argv[1:])
