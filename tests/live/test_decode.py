"""Decode Images gives the frames that the engine decodes, for every video of a batch; Decode Video saves the same."""

import numpy as np
import pytest
import torch
from graphs import (
    loaders,
    node,
    one_sampler,
    prompt,
    read_video,
    sample,
    save_images,
    save_latent,
    save_video,
    saved_images,
    saved_latent,
)

from rolling_kv.bundled import BUNDLED
from rolling_kv.vae.loading import load_vae
from rolling_kv.vae.taehv import Taehv, TinyVAE
from tools.comfyui.client import PromptFailed, first_file


def engine_frames(latent):
    """[T, H, W, 3] of 0 to 255, of one LATENT."""
    video = load_vae(BUNDLED).decoder().decode(latent)[0]
    return (video.clamp(-1, 1) * 127.5 + 127.5).permute(1, 2, 3, 0).cpu().numpy()


def test_images_and_video_show_what_the_engine_decodes(any_client):
    graph = one_sampler(2)
    graph["images"] = node("RollingKVDecodeImages", vae=["vae", 0], latent=["sample", 0])
    graph["save images"] = save_images("images")
    graph["video"] = node("RollingKVDecodeVideo", vae=["vae", 0], latent=["sample", 0])
    graph["save video"] = save_video("video")
    outputs = any_client.run(graph)
    images = saved_images(any_client, outputs, "save images")
    expected = engine_frames(saved_latent(any_client, outputs))
    assert images.shape == expected.shape == (21, 64, 64, 3) and images.std() > 5
    assert np.abs(images - expected).max() < 1.01  # rounding to a byte, after rounding in ComfyUI's torch
    video = read_video(any_client.view(first_file({"save video": outputs["save video"]}, ".mp4")))
    assert video.frames.shape == images.shape
    assert np.abs(video.frames - images).mean() < 6  # H.264 with half the colour resolution


def test_a_batch_gives_the_frames_of_one_video_after_the_other(client):
    graph = loaders() | {
        "positive": prompt("a red circle moving right"),
        "other": prompt("a blue square moving left"),
        "first": sample(1),
        "second": sample(1, positive="other", seed=2),
        "batch": node("LatentBatch", samples1=["first", 0], samples2=["second", 0]),
        "images": node("RollingKVDecodeImages", vae=["vae", 0], latent=["batch", 0]),
    }
    graph |= {f"save {name}": save_latent(name) for name in ("first", "second")} | {"save": save_images("images")}
    outputs = client.run(graph)
    images = saved_images(client, outputs, "save")
    expected = [engine_frames(saved_latent(client, outputs, f"save {name}")) for name in ("first", "second")]
    assert images.shape == (18, 64, 64, 3)
    assert np.abs(images - np.concatenate(expected)).max() < 1.01
    assert np.abs(expected[0] - expected[1]).mean() > 3


def test_a_tiny_decoder_takes_the_place_of_the_vae_and_x264_that_of_an_encoder_that_is_not_there(server, client):
    torch.manual_seed(3)
    tiny = Taehv(16, (8, 8, 8, 8), (1, 2, 2), 1)
    torch.save(tiny.state_dict(), server.folder / "models/vae_approx/taew2_1.pth")
    graph = one_sampler(1)
    graph["tiny"] = node("RollingKVLoadVAE", vae_name="taew2_1.pth")
    graph["images"] = node("RollingKVDecodeImages", vae=["tiny", 0], latent=["sample", 0])
    graph["save images"] = save_images("images")
    graph["video"] = node("RollingKVDecodeVideo", vae=["tiny", 0], latent=["sample", 0], encoder="h264_nvenc")
    graph["save video"] = save_video("video")
    outputs = client.run(graph)
    with torch.inference_mode():
        expected = TinyVAE(tiny).decoder().decode(saved_latent(client, outputs))[0]
    expected = (expected * 127.5 + 127.5).permute(1, 2, 3, 0).numpy()
    images = saved_images(client, outputs, "save images")
    assert images.shape == expected.shape == (9, 64, 64, 3) and np.abs(images - expected).max() < 1.01
    video = read_video(client.view(first_file({"save video": outputs["save video"]}, ".mp4")))
    assert video.frames.shape == images.shape and np.abs(video.frames - images).mean() < 6
    assert "taew2_1.pth is a tiny decoder" in server.log
    assert "the encoder h264_nvenc does not open here" in server.log, (
        "pictures of 64 pixels are too small for any GPU's"
    )


@pytest.mark.traceback_expected
def test_latents_of_another_model_are_refused(client):
    graph = loaders() | {"latent": node("EmptyLatentImage", width=64, height=64, batch_size=1)}
    graph["images"] = node("RollingKVDecodeImages", vae=["vae", 0], latent=["latent", 0])
    graph["save"] = save_images("images")
    with pytest.raises(PromptFailed, match=r"(?s)RollingKVDecodeImages.*Wan 2.1 video latents.*\[1, 4, 8, 8\]"):
        client.run(graph)
