"""3,000 latent frames, 12.5 minutes of video: finite to the end, in the memory that the first window took."""

import gc
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.bench.gauges import storage_bytes
from rolling_kv.cache.sizes import CacheBytes
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import ALL_FRAMES, CacheConfig, SamplingConfig
from rolling_kv.sampling.session import RollingSession

SAMPLING = SamplingConfig(chunk=6, denoising_steps=(1000,))
SIZE = dict(height=32, width=32)  # 4 tokens per latent frame
CHUNKS = 500
WINDOW = 14
STATM = Path("/proc/self/statm")
MiB = 2**20


class Memory(NamedTuple):
    """What a session holds beside its finished latents; resident: of the process, latents included."""

    cache: CacheBytes
    tensors: int
    tensor_bytes: int
    resident: int
    latents: int


def memory_of(session) -> Memory:
    gc.collect()
    finished = {id(chunk) for chunk in session.state.chunks}
    alive = [item for item in gc.get_objects() if type(item) is torch.Tensor and id(item) not in finished]
    resident = int(STATM.read_text().split()[1]) * 4096 if STATM.exists() else 0
    return Memory(session.cache_bytes, len(alive), storage_bytes(alive), resident, session.state.nbytes)


def run(cache, chunks, every):
    """Samples; every so many chunks, and after the last, what is held then. Every value of the video is looked at."""
    model = CausalModel(tiny_transformer())
    prompt = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    held = []
    with RollingSession(model, prompt, **SIZE, sampling=SAMPLING, cache=cache) as session:
        for number, chunk in enumerate(session.generate(chunks, seed=7), start=1):
            assert chunk.latents.isfinite().all() and chunk.latents.std() > 0.1, f"latent frame {chunk.start_frame}"
            if number % every == 0:
                held.append(memory_of(session))
    assert session.state.frames == chunks * SAMPLING.chunk
    return held


@pytest.mark.parametrize(
    "cache",
    [CacheConfig(WINDOW, sink=1), CacheConfig(WINDOW, sink=2, positions="window", storage="int8", offload=True)],
    ids=["plain", "window positions, int8, offloaded"],
)
def test_memory_does_not_grow_over_3000_latent_frames(cache):
    first, *later = run(cache, CHUNKS, every=100)
    assert len(later) == 4
    for held in later:
        assert held.cache == first.cache and sum(first.cache) > 0
        assert (held.tensors, held.tensor_bytes) == (first.tensors, first.tensor_bytes)
        assert held.resident - first.resident <= held.latents - first.latents + 6 * MiB


def test_the_same_look_sees_the_growth_of_an_unlimited_window():
    frame = 2 * 2 * 4 * 128 * 4  # keys and values, layers, tokens, dim, float32
    (first,), (second,) = (run(CacheConfig(ALL_FRAMES), chunks, every=chunks) for chunks in (20, 40))
    assert second.cache.device - first.cache.device == 20 * SAMPLING.chunk * frame
    assert second.tensor_bytes - first.tensor_bytes == 20 * SAMPLING.chunk * frame
