"""How passes are executed: what a transformer's weights allow, and which attention kernel a stock model uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from ..config import ExecutionConfig
from ..platforms import attending_with, attention_kernels, platform_of
from .offloaded import offloaded_blocks

eager: Any = torch.compiler.disable
"""Keeps a function out of the compiled parts. (torch's own annotations lose the function's arguments.)"""
COMPILED_SHAPES = 64


class Weights(NamedTuple):
    """What a transformer says of its weights.

    device: where they are.
    storage: one of `config.WEIGHT_STORAGES`; packed ones count as "model".
    packings: of weights from a GGUF file (Q8_0, Q4_K, …).
    offloaded: whether those of the blocks lie in CPU memory while they do not run.
    """

    device: torch.device
    storage: str
    packings: tuple[str, ...]
    offloaded: bool = False


def weights_of(transformer) -> Weights:
    """Device, storage, packings and place of a stock `WanTransformer3DModel`."""
    parameters = list(transformer.parameters())
    float8 = any(parameter.dtype == torch.float8_e4m3fn for parameter in transformer.blocks.parameters())
    packings = dict.fromkeys(p.quant_type.name for p in parameters if hasattr(p, "quant_type"))
    device = transformer.patch_embedding.weight.device
    offloaded = offloaded_blocks(transformer) is not None
    return Weights(device, "float8" if float8 else "model", tuple(packings), offloaded)


@contextmanager
def compiled_code(execution: ExecutionConfig) -> Iterator[None]:
    """Say it in a sentence if torch.compile, which begins at the first pass, cannot make code here.

    Each shape of a chunk has code of its own. torch keeps eight, and runs what comes after them uncompiled.
    """
    if not execution.compile:
        yield
        return
    settings: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.7
    try:
        with settings.patch({limit: COMPILED_SHAPES}):
            yield
    except Exception as error:
        cause = getattr(error, "inner_exception", None)  # of what torch._dynamo raises when its backend fails
        if cause is None:
            raise
        reason = str(cause).strip().splitlines()[0]
        raise ValueError(
            f"torch.compile cannot make code here ({reason}): install what it lacks, or turn compile off"
        ) from error


def best_kernels(transformer) -> AbstractContextManager:
    """Lets SDPA try its kernels in the order that suits the device and dtype of a transformer, for a while."""
    weight = transformer.patch_embedding.weight
    return attending_with(attention_kernels(platform_of(weight.device), weight.dtype))


@contextmanager
def attention_backend(transformer, backend: str | None) -> Iterator[None]:
    """Let the attention of a stock transformer use `backend` for a while; None: see `best_kernels`.

    diffusers' own `set_attention_backend` also changes what every other model uses.
    """
    if backend is None:
        with best_kernels(transformer):
            yield
        return
    processors = [attention.processor for block in transformer.blocks for attention in (block.attn1, block.attn2)]
    before = [processor._attention_backend for processor in processors]
    try:
        for processor in processors:
            processor._attention_backend = backend
        yield
    finally:
        for processor, name in zip(processors, before):
            processor._attention_backend = name
