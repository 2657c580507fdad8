"""Each of several processes makes the same video with the others, and the first one tells how long that took."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from ...checkpoints.model import CausalModel
from ...checkpoints.transformer import build_transformer
from ...config import CacheConfig, SamplingConfig
from ...presets import ModelPreset
from ...sampling.session import RollingSession
from ...wan.shards import HeadShards
from ..figures import full_window
from ..gauges import now
from ..random_model import SIZES, random_prompt, random_weights


class RanksExperiment(NamedTuple):
    """What to measure.

    size: a name of `SIZES`. height, width: pixels. ranks: counts of processes, 1 among them.
    chunks: of each video. dtype: of torch, by its name. device: "cpu" or "cuda". threads: of each process.
    """

    size: str
    height: int
    width: int
    ranks: tuple[int, ...]
    chunks: int
    dtype: str
    device: str
    threads: int

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(SIZES[self.size].window)


class Measured(NamedTuple):
    """Of one count of processes.

    seconds: of a chunk with a full window. sent: bytes from one process for such a chunk. cache: bytes of one process.
    error: largest difference of the latents from those of one process, as a part of their largest value.
    """

    ranks: int
    seconds: float
    sent: float
    cache: int
    error: float


def measure(experiment: RanksExperiment) -> list[Measured]:
    """Make the video with each count of processes, one count after the other."""
    results = []
    with TemporaryDirectory() as folder:
        for ranks in experiment.ranks:
            processes.spawn(_work, (experiment, ranks, folder), nprocs=ranks)
            told: dict[str, Any] = json.loads(Path(folder, f"{ranks}.json").read_text())
            first, own = (
                torch.load(Path(folder, f"{count}.pt"), weights_only=True) for count in (experiment.ranks[0], ranks)
            )
            error = float((first - own).abs().max() / first.abs().max())
            results.append(Measured(ranks, told["seconds"], told["sent"], told["cache"], error))
    return results


def _work(rank: int, experiment: RanksExperiment, ranks: int, folder: str) -> None:
    torch.set_num_threads(experiment.threads)
    device, dtype = torch.device(experiment.device), getattr(torch, experiment.dtype)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    meeting = Path(folder, f"{ranks}.meeting").as_uri()  # they find each other by a file
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=ranks
    )
    try:
        shards = HeadShards() if ranks > 1 else None
        weights = random_weights(SIZES[experiment.size], dtype, device)
        preset = ModelPreset("bench", SamplingConfig(), experiment.cache)
        model = CausalModel(build_transformer(weights, dtype=dtype, device=device), preset)
        session = RollingSession(
            model, random_prompt(dtype, device), height=experiment.height, width=experiment.width, shards=shards
        )
        seconds, sent = [], []
        with session:
            chunks = session.generate(experiment.chunks)
            for _ in range(experiment.chunks):
                before, begin = shards.sent if shards else 0, now(device)
                next(chunks)
                seconds.append(now(device) - begin)
                sent.append((shards.sent if shards else 0) - before)
            cache = sum(session.cache_bytes)
            chunks.close()
        if rank == 0:
            full = full_window(experiment.chunks, preset.sampling, preset.cache)
            told = {"seconds": min(seconds[at] for at in full), "sent": sent[full[-1]], "cache": cache}
            torch.save(session.state.latents().float().cpu(), Path(folder, f"{ranks}.pt"))
            Path(folder, f"{ranks}.json").write_text(json.dumps(told))
        dist.barrier()
    finally:
        dist.destroy_process_group()
