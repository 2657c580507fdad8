"""One video by several processes, each with a part of the cache: torchrun --nproc-per-node 2 -m docs.examples.shared"""

import torch

from rolling_kv import Pipeline
from rolling_kv.wan.shards import shared_by_torchrun

with shared_by_torchrun(torch.device("cpu")) as (shards, device):  # "cuda": each process takes the GPU of its number
    pipeline = Pipeline.load("models/tiny", device=device)
    pipeline.generate(
        "a red circle moving left", "shared.mp4", height=64, width=64, seconds=2, seed=1, scale=6, shards=shards
    )
