"""ComfyUI's own nodes take what these nodes give, and give what they take."""

import numpy as np
import pytest
import torch
from builders import original_names, tiny_transformer
from graphs import loaders, node, one_sampler, save_images, save_latent, saved_images, saved_latent
from safetensors.torch import save_file
from vaes import make_vae, originals_of

from rolling_kv.bundled import BUNDLED
from rolling_kv.checkpoints.model import load_model


@pytest.fixture(scope="module")
def models(default_server):
    """Models as ComfyUI users have them, with random weights: single files with the original Wan names, and a folder.

    ComfyUI's own loaders know no other depth than the original's, which the bundled VAE does not have.
    """
    folder = default_server.folder / "models"
    save_file(originals_of(make_vae()), folder / "vae/random_vae.safetensors")
    transformer = tiny_transformer(text_dim=load_model(BUNDLED).transformer.config.text_dim)
    save_file(original_names(transformer.state_dict()), folder / "diffusion_models/random_model.safetensors")
    transformer.save_pretrained(folder / "diffusers/random_folder/transformer")


def test_vae_decode_shows_what_decode_images_shows(client, models):
    graph = one_sampler(2) | loaders(vae="random_vae.safetensors")
    graph["ours"] = node("RollingKVDecodeImages", vae=["vae", 0], latent=["sample", 0])
    graph["native vae"] = node("VAELoader", vae_name="random_vae.safetensors")
    graph["native"] = node("VAEDecode", vae=["native vae", 0], samples=["sample", 0])
    graph |= {"save ours": save_images("ours"), "save native": save_images("native")}
    outputs = client.run(graph)
    ours, native = (saved_images(client, outputs, name) for name in ("save ours", "save native"))
    assert ours.shape == native.shape == (21, 64, 64, 3)
    assert ours.std() > 5
    assert np.abs(ours - native).max() <= 3


def test_vae_encode_gives_the_latent_of_encode_video(client, models):
    graph = loaders(vae="random_vae.safetensors") | {
        "image": node("LoadImage", image="example.png"),
        "scaled": node("ImageScale", image=["image", 0], upscale_method="area", width=64, height=64, crop="center"),
        "ours": node("RollingKVEncodeVideo", vae=["vae", 0], images=["scaled", 0], width=64, height=64),
        "native vae": node("VAELoader", vae_name="random_vae.safetensors"),
        "native": node("VAEEncode", vae=["native vae", 0], pixels=["scaled", 0]),
        "save ours": save_latent("ours"),
        "save native": save_latent("native"),
    }
    outputs = client.run(graph)
    ours, native = (saved_latent(client, outputs, name) for name in ("save ours", "save native"))
    assert ours.shape == native.shape == (1, 16, 1, 8, 8)
    torch.testing.assert_close(ours, native, atol=0.02 * native.std().item(), rtol=0)


def test_a_single_file_and_a_diffusers_folder_give_the_same_video(client, models):
    latents = []
    for name in ("random_model.safetensors", "random_folder"):
        graph = one_sampler(2) | {"model": loaders(model=name)["model"]}
        latents.append(saved_latent(client, client.run(graph)))
    assert torch.equal(*latents)


def test_image_to_video_starts_with_the_image(client):
    graph = one_sampler(1, initial_latent=["start", 0])
    graph["image"] = node("LoadImage", image="example.png")
    graph["start"] = node("RollingKVEncodeVideo", vae=["vae", 0], images=["image", 0], width=96, height=64)
    graph["save start"] = save_latent("start")
    outputs = client.run(graph)
    start, video = saved_latent(client, outputs, "save start"), saved_latent(client, outputs)
    assert video.shape == (1, 16, 4, 8, 12)
    torch.testing.assert_close(video[:, :, :1], start, atol=1e-4, rtol=1e-4)
