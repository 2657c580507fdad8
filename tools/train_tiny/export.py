"""Write what was trained as a diffusers folder that the pack loads: real classes, float32, about 10 MB.

    python -m tools.train_tiny.export models/tiny

Float32, because a CPU computes in the dtype that the files have, and half precision is slow there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from rolling_kv.checkpoints.detect import ONLY_SIZE
from rolling_kv.tiny import save_model
from rolling_kv.vae.latents import LATENTS_MEAN, LATENTS_STD

from .loop import WORK
from .prompts import vocabulary
from .train_lora import LORA, save_lora
from .train_transformer import PRESET, Denoiser, tokenizer_file
from .train_vae import CODE, SCALE, linear_code
from .train_vae import CONFIG as VAE_CONFIG
from .world import SIDE


def averaged(name: str) -> dict:
    return torch.load(WORK / f"{name}.pt", weights_only=True)["averaged"]


def finished_vae() -> AutoencoderKLWan:
    """Encoder and decoder together, with raw latents in the range of the Wan 2.1 VAE.

    ComfyUI and the pack normalise any Wan 2.1 latents by the published statistics. So the 1x1x1 convolutions at the
    bottleneck absorb them: raw = SCALE * code * std + mean. The encoder's spread is next to nothing.
    """
    vae = AutoencoderKLWan(**VAE_CONFIG, latents_mean=list(LATENTS_MEAN), latents_std=list(LATENTS_STD))
    vae.load_state_dict(vae.state_dict() | averaged("polished") | averaged("encoder"))
    mean, std = torch.tensor(LATENTS_MEAN), SCALE * torch.tensor(LATENTS_STD)
    with torch.no_grad():
        out, back = vae.quant_conv, vae.post_quant_conv
        out.weight[:16] *= std.view(-1, 1, 1, 1, 1)
        out.bias[:16] = out.bias[:16] * std + mean
        out.weight[16:] = 0
        out.bias[16:] = -20
        back.weight /= std.view(1, -1, 1, 1, 1)
        back.bias -= back.weight.flatten(1) @ mean
    return vae.eval()


def export(folder: Path, denoiser: str = "transformer") -> None:
    model = Denoiser()
    model.load_state_dict(averaged(denoiser))
    save_model(
        folder,
        model.transformer,
        finished_vae(),
        model.text.shipped(),
        tokenizer_file().read_bytes(),
        PRESET,
        {"words": vocabulary(), ONLY_SIZE: [SIDE, SIDE]},
    )
    linear_code().save(folder / CODE)
    save_lora(folder / LORA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--denoiser", default="transformer", help="name of the checkpoint to take")
    arguments = parser.parse_args()
    export(arguments.folder, arguments.denoiser)


if __name__ == "__main__":
    main()
