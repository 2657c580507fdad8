"""Short videos of a small model with random weights, and whether two of them are the same."""

from __future__ import annotations

import torch
from builders import tiny_transformer

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState

HEIGHT, WIDTH = 32, 48
SAMPLING = SamplingConfig(chunk=2, denoising_steps=(1000, 500))
WINDOW = CacheConfig(5, sink=1)


def small_model() -> CausalModel:
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12)
    return CausalModel(transformer, ModelPreset("test", SAMPLING, WINDOW))


def prompt(model, seed=0, batch=1):
    return torch.randn(batch, 6, model.transformer.config.text_dim, generator=torch.Generator().manual_seed(seed))


def sample(model, chunks, *, seed=7, words=0, **kwargs) -> CacheState:
    with RollingSession(model, prompt(model, words), height=HEIGHT, width=WIDTH, **kwargs) as session:
        for _ in session.generate(chunks, seed=seed):
            pass
    return session.state


def same(a: CacheState, b: CacheState) -> bool:
    return torch.equal(a.latents(), b.latents()) and a.key == b.key


class Cancelled(BaseException):
    """Like ComfyUI's interrupt, not an Exception."""
