"""Small VAEs with random weights, their tensors by the original names, and what goes into them."""

import copy
import re

import torch
from diffusers import AutoencoderKLWan

from rolling_kv.vae.latents import STATISTICS
from rolling_kv.vae.loading import ARCHITECTURES


def make_vae(**config) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**{"base_dim": 4, **config}).eval().requires_grad_(False)
    vae.decoder.conv_out.weight *= 40  # so that some values need the clamp
    return vae


class FrameByFrame(torch.nn.Module):
    """A 1x1x1 convolution one frame at a time. How it rounds depends on the number of frames, on some processors."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return torch.cat([self.convolution(frame) for frame in x.split(1, 2)], 2)


def frame_by_frame(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same weights in a stock VAE whose 1x1x1 convolutions run as a stream runs them."""
    vae = copy.deepcopy(vae)
    vae.quant_conv, vae.post_quant_conv = FrameByFrame(vae.quant_conv), FrameByFrame(vae.post_quant_conv)
    return vae


def make_vae_22(**config) -> AutoencoderKLWan:
    """One of Wan 2.2's architecture, with the statistics that were published with it."""
    mean, std = STATISTICS[48]
    return make_vae(**ARCHITECTURES[48], latents_mean=list(mean), latents_std=list(std), **config)


STOCK = make_vae()
REFERENCE = frame_by_frame(STOCK)
STOCK_22 = make_vae_22()
REFERENCE_22 = frame_by_frame(STOCK_22)


def latents(frames: int, height=2, width=4, seed=0, channels=16) -> torch.Tensor:
    return torch.randn(1, channels, frames, height, width, generator=torch.Generator().manual_seed(seed))


def pixels(frames: int, height=16, width=24, seed=0) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def original_name(name: str) -> str:
    """The name in the original Wan code of a diffusers VAE tensor."""
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle.1").replace("down_blocks", "downsamples")
    name = re.sub(r"((?:middle|samples)\.\d+)\.(norm1|conv1|norm2|conv2)\b", lambda m: f"{m[1]}.{residual[m[2]]}", name)
    name = name.replace("conv_shortcut", "shortcut").replace("norm_out", "head.0").replace("conv_out", "head.2")
    return name.replace("conv_in", "conv1").replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")


def original_name_22(name: str) -> str:
    """The name in Wan 2.2's original code, whose blocks hold their layers in a list of their own."""
    inner = re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d)\.(?:resnets\.(\d)|\w+sampler)\.(.+)", name)
    if inner is None:
        return original_name(name)
    half, way, block, layer, rest = inner.groups()
    layer = layer or {"down": "2", "up": "3"}[way]
    rest = original_name(f"middle.0.{rest}").removeprefix("middle.0.")
    return f"{half}.{way}samples.{block}.{way}samples.{layer}.{rest}"


def tensors_of(vae: AutoencoderKLWan) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in vae.state_dict().items()}


def originals_of(vae: AutoencoderKLWan) -> dict[str, torch.Tensor]:
    rename = original_name_22 if vae.config.is_residual else original_name
    return {rename(name): tensor for name, tensor in tensors_of(vae).items()}
