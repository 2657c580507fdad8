"""Weights as ComfyUI leaves them on CUDA: moved inside inference mode, and so inference tensors from then on."""

import pytest
import torch
from builders import tiny_transformer
from diffusers import AutoencoderKLWan
from lora_files import matrices, peft
from videos import SAMPLING, WINDOW, prompt, same, sample

from rolling_kv.checkpoints.float8 import store_float8
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig
from rolling_kv.lora.reader import read_lora
from rolling_kv.lora.stack import LoraStack
from rolling_kv.presets import ModelPreset
from rolling_kv.text import load_text_encoder
from rolling_kv.tiny import make_tiny
from rolling_kv.vae.wan import WanVAE

SIZE = dict(num_attention_heads=2, attention_head_dim=12)


@pytest.fixture
def as_inference():
    """Makes a module's weights inference tensors, as a move to another device inside inference mode does."""

    def moved(module: torch.nn.Module) -> torch.nn.Module:
        with torch.inference_mode():
            for part in module.modules():
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        part._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
        assert all(parameter.is_inference() for parameter in module.parameters())
        return module

    return moved


def model(dtype=torch.float32, float8=False) -> CausalModel:
    transformer = tiny_transformer(**SIZE).to(dtype)
    if float8:
        store_float8(transformer)
    return CausalModel(transformer, ModelPreset("test", SAMPLING, WINDOW))


def embeds(made):
    return prompt(made).to(made.dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(execution=ExecutionConfig(exact=True)),
        dict(cache=CacheConfig(5, sink=1, storage="int8")),
        dict(cache=CacheConfig(5, sink=1, offload=True)),
        dict(cache=CacheConfig(5, sink=1, positions="window", leaving="memory")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_video_is_the_same(as_inference, settings, dtype):
    plain, moved = model(dtype), as_inference(model(dtype))
    assert same(sample(plain, 4, **settings), sample(moved, 4, **settings))


def test_weights_in_float8_make_the_same_video_twice(as_inference):
    plain, moved = model(torch.bfloat16, float8=True), as_inference(model(torch.bfloat16, float8=True))
    expected = sample(plain, 3)
    assert same(sample(moved, 3), expected) and same(sample(moved, 3), expected)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("float8", [True, False])
def test_loras_come_on_change_and_go(as_inference, fuse, float8):
    if fuse and float8:
        pytest.skip("float8 takes no sums")
    made = {"plain": model(float8=float8), "moved": as_inference(model(float8=float8))}
    lora = read_lora(peft(matrices(**SIZE)))
    videos = {}
    for name, one in made.items():
        stack, seen = LoraStack(one, fuse=fuse), []
        for strengths in ((1.0,), (0.5,), ()):
            stack.set([(lora, strength) for strength in strengths])
            seen.append(sample(one, 2))
        videos[name] = [*seen, sample(one, 2)]
    assert all(same(mine, other) for mine, other in zip(videos["plain"], videos["moved"]))
    assert same(videos["moved"][2], sample(model(float8=float8), 2))


def test_the_vae_is_the_same_both_ways(as_inference):
    torch.manual_seed(0)
    stock = AutoencoderKLWan(base_dim=4).eval().requires_grad_(False)
    latents, pixels = torch.randn(1, 16, 3, 2, 2), torch.rand(1, 3, 9, 16, 16) * 2 - 1
    decoded, encoded = WanVAE(stock).decoder().decode(latents), WanVAE(stock).encode_video(pixels)
    moved = as_inference(WanVAE(stock))
    assert torch.equal(moved.decoder().decode(latents), decoded)
    assert torch.equal(moved.encode_video(pixels), encoded)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_prompts_are_the_same(dtype, as_inference, tmp_path):
    encoder = load_text_encoder(make_tiny(tmp_path / "tiny"), dtype=dtype)
    expected = encoder.encode(["a red circle", ""])
    assert torch.equal(as_inference(encoder).encode(["a red circle", ""]), expected)
