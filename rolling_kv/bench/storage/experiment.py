"""What is measured: one model and one video, with every way to keep the cache and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import is_gguf_available
from torch import Tensor

from ...checkpoints.float8 import store_float8
from ...checkpoints.gguf import GGUF_PACKAGE, as_packed
from ...checkpoints.model import CausalModel
from ...checkpoints.transformer import build_transformer
from ...config import CACHE_STORAGES
from ...geometry import WAN_21, geometry_of
from ...presets import ModelPreset
from ..figures import full_window

PLAIN = "model"
FLOAT8 = "float8"


@dataclass(frozen=True)
class StorageExperiment:
    """What every run shares.

    weights: in any names that `build_transformer` takes, in `dtype` on `device`; config: what their shapes do not tell.
    preset: sampling, and the cache but for its storage. prompt: embedding [1, L, D]. chunks: of the video, all from
    noise of `seed`. memory: where CUDA does not count it, follow peak memory in runs of its own.
    Raises ValueError for a video size or a window that the model does not take.
    """

    name: str
    weights: dict[str, Tensor]
    config: dict
    preset: ModelPreset
    prompt: Tensor
    height: int
    width: int
    chunks: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    memory: bool = True

    def __post_init__(self):
        geometry_of(self.config.get("in_channels", WAN_21.channels)).latent_size(self.height, self.width)
        self.preset.sampling.check_cache(self.preset.cache)

    @property
    def full_window(self) -> list[int]:
        return full_window(self.chunks, self.preset.sampling, self.preset.cache)


@dataclass(frozen=True)
class Variant:
    """weights: PLAIN (the model's dtype), FLOAT8, or a packing of GGUF files. cache: one of CACHE_STORAGES."""

    weights: str = PLAIN
    cache: str = PLAIN
    offload: bool = False

    @property
    def title(self) -> str:
        return f"weights {self.weights}, cache {self.cache}{', offloaded' if self.offload else ''}"


def variants(packings: Sequence[str]) -> list[Variant]:
    """All of them, the plain one first. packings: of GGUF files."""
    caches = [Variant(cache=cache, offload=offload) for offload in (False, True) for cache in CACHE_STORAGES]
    return caches + [Variant(weights=weights) for weights in (FLOAT8, *packings)]


def check_packings(names: Sequence[str]) -> None:
    """Raise ValueError unless weights can be packed so here."""
    if names and not is_gguf_available():
        raise ValueError(f'packing weights needs the Python package gguf: pip install "{GGUF_PACKAGE}", or --gguf none')
    if unknown := [name for name in names if name not in packings()]:
        raise ValueError(f"the package gguf packs weights as {', '.join(packings())}; got {', '.join(unknown)}")


def packings() -> list[str]:
    """Packings that diffusers unpacks and the package gguf makes: it reads the K-quants, and cannot make them."""
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    made = []
    for kind in set(SUPPORTED_GGUF_QUANT_TYPES) - {gguf.GGMLQuantizationType.BF16}:  # a dtype, not a packing
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.quantize(torch.zeros(1, block).numpy(), kind)
        except NotImplementedError:
            continue
        made.append(kind.name)
    return sorted(made)


def pack(weights: dict[str, Tensor], packing: str) -> dict[str, Tensor]:
    """The weights, the matrices of the blocks packed as in a GGUF file: those that float8 storage takes as well."""
    import gguf

    kind = gguf.GGMLQuantizationType[packing]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    packed = dict(weights)
    for name, tensor in weights.items():
        if "blocks." in name and tensor.ndim == 2 and tensor.shape[1] % block == 0:
            values = gguf.quants.quantize(tensor.float().cpu().numpy(), kind)
            packed[name] = as_packed(torch.from_numpy(values), kind)
    return packed


def build(experiment: StorageExperiment, storage: str, dtype: torch.dtype | None = None) -> CausalModel:
    """A model of its own around the shared weights, kept as `storage` says."""
    weights = experiment.weights if storage in (PLAIN, FLOAT8) else pack(experiment.weights, storage)
    transformer = build_transformer(weights, experiment.config, dtype or experiment.dtype, experiment.device)
    if storage == FLOAT8:
        store_float8(transformer)
    return CausalModel(transformer, experiment.preset)
