"""Models of a true shape with random weights, for measuring where nobody has the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ..checkpoints.model import CausalModel
from ..checkpoints.transformer import build_transformer
from ..config import CacheConfig, SamplingConfig
from ..geometry import TEXT_LENGTH, WAN_21
from ..presets import ModelPreset
from ..vae.taehv import Taehv

HEAD_DIM = 128
"""Of every Wan model; ComfyUI takes it for granted."""
CHANNELS = 16
TEXT_DIM = 4096
FREQ_DIM = 256


@dataclass(frozen=True)
class BenchSize:
    """The shape of a model, and the video that it is measured on by default: pixels, window in latent frames."""

    layers: int
    dim: int
    ffn: int
    height: int
    width: int
    window: int

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    def describe(self) -> str:
        """The shape, for people."""
        return f"{self.layers} layers, dim {self.dim}, heads of {HEAD_DIM}, ffn {self.ffn}, random weights"


SIZES = {
    "tiny": BenchSize(4, 128, 256, 64, 64, window=9),
    "mid": BenchSize(8, 512, 2048, 240, 416, window=7),
    "1.3B": BenchSize(30, 1536, 8960, 480, 832, window=21),
    "14B": BenchSize(40, 5120, 13824, 480, 832, window=21),
}
"""1.3B and 14B are Wan 2.1's. mid is for CPUs, tiny for tests."""


VAE_SIZES = {"tiny": 8, "full": 96}
"""Base widths of Wan 2.1's VAE: the true one, and one for tests."""
TAEHV = ((256, 128, 64, 64), (1, 2, 2), 1)
"""Widths, frames that each frame becomes, and patch of the file taew2_1."""


@torch.inference_mode(False)
def random_vae(name: str, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
    """A stock VAE of Wan 2.1's shape, of the width that `VAE_SIZES` names."""
    with torch.device(device):
        vae = AutoencoderKLWan(base_dim=VAE_SIZES[name])
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    return vae.eval().requires_grad_(False)


@torch.inference_mode(False)
def random_taehv(dtype: torch.dtype, device: torch.device) -> Taehv:
    """A tiny decoder of the shape of taew2_1."""
    with torch.device(device):
        return Taehv(WAN_21.channels, *TAEHV).to(dtype).eval().requires_grad_(False)


@torch.inference_mode(False)
def random_weights(size: BenchSize, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Weights under the names of the original Wan release, made in the dtype and on the device they are used in.

    Scaled by their fan-in, so that activations stay near 1: functions such as tanh take longer far outside.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=dtype, device=device)
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=device)
        fan_in = shape[-1] if "modulation" in name else torch.Size(shape[1:]).numel()
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(fan_in**-0.5)

    return {name: fill(name, shape) for name, shape in weight_shapes(size).items()}


def random_prompt(dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """A text embedding, [1, L, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=generator).to(device, dtype)


def random_preset(name: str, window: int | Literal["all"] | None = None) -> ModelPreset:
    """Settings for a model of `SIZES`. window: in latent frames; None: the size's."""
    return ModelPreset(
        f"random {name}", SamplingConfig(), CacheConfig(SIZES[name].window if window is None else window)
    )


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> CausalModel:
    """A model of the shape that `SIZES` names."""
    weights = random_weights(SIZES[name], dtype, device)
    return CausalModel(build_transformer(weights, dtype=dtype, device=device), random_preset(name))


def weight_shapes(size: BenchSize) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Wan 2.1 text-to-video model of that size."""
    dim, ffn = size.dim, size.ffn
    linears = {
        "text_embedding.0": (dim, TEXT_DIM), "text_embedding.2": (dim, dim), "time_embedding.0": (dim, FREQ_DIM),
        "time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim), "head.head": (4 * CHANNELS, dim),
        "patch_embedding": (dim, CHANNELS, 1, 2, 2),
    }  # fmt: skip
    others = {"head.modulation": (1, 2, dim)}
    for block in (f"blocks.{index}" for index in range(size.layers)):
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            linears |= {f"{attention}.{name}": (dim, dim) for name in "qkvo"}
            others |= {f"{attention}.norm_{name}.weight": (dim,) for name in "qk"}
        linears |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
        others |= {f"{block}.modulation": (1, 6, dim)}
        others |= {f"{block}.norm3.{name}": (dim,) for name in ("weight", "bias")}
    biases = {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return {f"{name}.weight": shape for name, shape in linears.items()} | biases | others
