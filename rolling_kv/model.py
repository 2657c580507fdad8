"""A loaded causal video model: the stock diffusers transformer together with what it was trained for."""

from __future__ import annotations

import hashlib
import json

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from .config import PRESETS, ModelPreset
from .weights import plain


class CausalModel(nn.Module):
    """A holder of one transformer. It has no `device` attribute, so that a memory manager may assign one.

    transformer: the stock diffusers model.
    preset: the sampling and cache settings that the weights were trained for.
    identity: 16 hex digits that tell these weights from others, the same for every file layout they are read from.
    """

    def __init__(self, transformer: WanTransformer3DModel, preset: ModelPreset = PRESETS["self-forcing"]):
        super().__init__()
        self.transformer = transformer
        self.preset = preset
        self.identity = fingerprint(transformer)
        self.train(transformer.training)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model computes in; norms and time embedding may be kept in float32."""
        return self.transformer.patch_embedding.weight.dtype

    def compute_device(self) -> torch.device:
        """Where the weights are now."""
        return self.transformer.patch_embedding.weight.device


def fingerprint(transformer: WanTransformer3DModel) -> str:
    """16 hex digits over the model's shape, dtype and a sample of each tensor's values."""
    config = transformer.config
    tensors = [(name, plain(tensor)) for name, tensor in sorted(transformer.state_dict().items())]
    shape = {
        "heads": config.num_attention_heads,
        "patch": list(config.patch_size),
        "tensors": [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors],
    }
    sample = torch.cat([tensor.flatten()[:: max(1, tensor.numel() // 16)].float() for _, tensor in tensors])
    digest = hashlib.sha256(json.dumps(shape).encode())
    digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
