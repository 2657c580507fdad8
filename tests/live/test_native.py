"""ComfyUI's own nodes take what these nodes give, and give what they take."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from graphs import PACK, loaders, node, one_sampler, save_images, save_latent, saved_images, saved_latent
from safetensors.torch import save_file

from tests.engine.builders import original_names
from tests.engine.test_vae import originals_of


@pytest.fixture(scope="module")
def single_files(default_server):
    """The bundled model as ComfyUI users have models: single files with the original Wan names."""
    models = default_server.folder / "models"
    vae = AutoencoderKLWan.from_pretrained(PACK / "models/tiny/vae")
    save_file(originals_of(vae), models / "vae/tiny_vae.safetensors")
    transformer = WanTransformer3DModel.from_pretrained(PACK / "models/tiny/transformer")
    save_file(original_names(transformer.state_dict()), models / "diffusion_models/tiny_model.safetensors")


def test_vae_decode_shows_what_decode_images_shows(client, single_files):
    graph = one_sampler(2)
    graph["ours"] = node("RollingKVDecodeImages", vae=["vae", 0], latent=["sample", 0])
    graph["native vae"] = node("VAELoader", vae_name="tiny_vae.safetensors")
    graph["native"] = node("VAEDecode", vae=["native vae", 0], samples=["sample", 0])
    graph |= {"save ours": save_images("ours"), "save native": save_images("native")}
    outputs = client.run(graph)
    ours, native = (saved_images(client, outputs, name) for name in ("save ours", "save native"))
    assert ours.shape == native.shape == (21, 64, 64, 3)
    assert ours.std() > 5
    assert np.abs(ours - native).max() <= 3


def test_vae_encode_gives_the_latent_of_encode_video(client, single_files):
    graph = loaders() | {
        "image": node("LoadImage", image="example.png"),
        "scaled": node("ImageScale", image=["image", 0], upscale_method="area", width=64, height=64, crop="center"),
        "ours": node("RollingKVEncodeVideo", vae=["vae", 0], images=["scaled", 0], width=64, height=64),
        "native vae": node("VAELoader", vae_name="tiny_vae.safetensors"),
        "native": node("VAEEncode", vae=["native vae", 0], pixels=["scaled", 0]),
        "save ours": save_latent("ours"),
        "save native": save_latent("native"),
    }
    outputs = client.run(graph)
    ours, native = (saved_latent(client, outputs, name) for name in ("save ours", "save native"))
    assert ours.shape == native.shape == (1, 16, 1, 8, 8)
    torch.testing.assert_close(ours, native, atol=0.02 * native.std().item(), rtol=0)


def test_a_single_file_in_diffusion_models_samples_as_the_bundled_folder(client, single_files):
    bundled = saved_latent(client, client.run(one_sampler(2)))
    graph = one_sampler(2) | {"model": loaders(model="tiny_model.safetensors")["model"]}
    single = saved_latent(client, client.run(graph))
    assert single.shape == bundled.shape


def test_image_to_video_starts_with_the_image(client):
    graph = one_sampler(1, initial_latent=["start", 0])
    graph["image"] = node("LoadImage", image="example.png")
    graph["start"] = node("RollingKVEncodeVideo", vae=["vae", 0], images=["image", 0], width=96, height=64)
    graph["save start"] = save_latent("start")
    outputs = client.run(graph)
    start, video = saved_latent(client, outputs, "save start"), saved_latent(client, outputs)
    assert video.shape == (1, 16, 4, 8, 12)
    torch.testing.assert_close(video[:, :, :1], start, atol=1e-4, rtol=1e-4)
