"""A LoRA for the finished transformer: the background in stripes, which no prompt asks for.

    python -m tools.train_tiny.train_lora

It learns from the transformer's own examples with another background. The stripes lie on the cells of the latents, so the
code carries them as it does a plain background, and the VAE has seen them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from rolling_kv.bundled import BUNDLED, BUNDLED_LORA

from .loop import WORK, part_parser, train
from .train_transformer import CLIPS, GOING_ON, Denoiser, Losses, motion_pool

LORA = BUNDLED_LORA.relative_to(BUNDLED)
"""Where the LoRA lies in the model's folder."""
STEPS, RATE, RANK = 1100, 2e-3, 8


class LowRank(nn.Module):
    """A linear layer that is left as it is, and a low-rank change."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def adapted() -> Denoiser:
    """The trained model with a low-rank change, which alone is trained, at every matrix of its blocks."""
    model = Denoiser()
    model.load_state_dict(torch.load(WORK / "transformer.pt", weights_only=True)["averaged"])
    model.requires_grad_(False)
    blocks = model.transformer.blocks
    for name, layer in [(name, layer) for name, layer in blocks.named_modules() if isinstance(layer, nn.Linear)]:
        parent, _, last = name.rpartition(".")
        setattr(blocks.get_submodule(parent), last, LowRank(layer))
    return model


def train_lora(steps: int = STEPS) -> nn.Module:
    torch.manual_seed(0)
    model = adapted()
    return train("lora", model, Losses(model, motion_pool(CLIPS), GOING_ON, striped=True), steps, RATE, average=0.99)


def save_lora(path: Path) -> None:
    """Write the LoRA in the names of diffusers, in bfloat16."""
    weights = torch.load(WORK / "lora.pt", weights_only=True)["averaged"]
    names = {".down": ".lora_A.weight", ".up": ".lora_B.weight"}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.removesuffix(half) + other: weights[name].bfloat16().contiguous()
        for half, other in names.items()
        for name in sorted(weights)
        if name.endswith(half)
    }
    save_file(tensors, path, {"format": "pt"})


def main() -> None:
    arguments = part_parser(__doc__, STEPS).parse_args()
    torch.set_num_threads(arguments.threads)
    train_lora(arguments.steps or STEPS)


if __name__ == "__main__":
    main()
