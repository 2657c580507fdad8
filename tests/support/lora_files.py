"""LoRAs with random values for small models, in the layouts that people have them in."""

import torch
from builders import original_names, tiny_transformer
from torch import nn

RANK = 4


def matrices(rank=RANK, seed=3, only="blocks", **size):
    """Matrices (down, up) by diffusers' module name, for every Linear of the blocks of a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in tiny_transformer(**size).named_modules() if isinstance(m, nn.Linear) and only in n}
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) / 8,
            torch.randn(layer.out_features, rank, generator=generator) / 8,
        )
        for name, layer in layers.items()
    }


def original(module):
    return next(iter(original_names({f"{module}.weight": None}))).removesuffix(".weight")


def peft(pairs, prefix="transformer.", rename=lambda module: module, adapter=""):
    return {
        f"{prefix}{rename(module)}.lora_{half}{adapter}.weight": tensor
        for module, pair in pairs.items()
        for half, tensor in zip("AB", pair)
    }


def kohya(pairs, prefix, rename, alpha):
    tensors = {}
    for module, (down, up) in pairs.items():
        name = prefix + rename(module)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


def underscored(module):
    return original(module).replace(".", "_")


def fsdp(module):
    return original(module).replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")
