"""Models with the latents of Wan 2.2's 5B: 48 channels, 16x16 pixels each, 24 frames per second."""

import json
import subprocess

import pytest
import torch
from graphs import (
    chosen,
    loaders,
    node,
    one_sampler,
    prompt,
    read_video,
    sample,
    save_images,
    save_latent,
    saved_images,
    saved_latent,
)
from safetensors.torch import load_file, save_file
from vaes import latents, make_vae_22, originals_of, pixels

from rolling_kv.checkpoints.model import load_model
from rolling_kv.geometry import WAN_22
from rolling_kv.sampling.session import RollingSession
from rolling_kv.text import load_text_encoder
from rolling_kv.tiny import make_tiny
from rolling_kv.vae.latents import LATENTS_MEAN_22, LATENTS_STD_22, to_model, to_raw
from rolling_kv.vae.wan import WanVAE
from tools.comfyui.client import PromptFailed, first_file

MODEL = "tiny_wan_22"


@pytest.fixture(scope="module")
def model(default_server):
    make_tiny(default_server.folder / "models/diffusers" / MODEL, geometry=WAN_22)
    return MODEL


def graph(**inputs) -> dict:
    made = loaders(MODEL, MODEL, MODEL) | {
        "positive": prompt("a red circle moving right"),
        "sample": sample(2, **inputs),
        "save": save_latent("sample"),
        "video": node("RollingKVDecodeVideo", vae=["vae", 0], latent=["sample", 0]),
    }
    made["save video"] = node(
        "SaveVideo", video=["video", 0], filename_prefix="video/test", format="auto", codec="auto"
    )
    return made


@pytest.mark.traceback_expected
def test_a_context_is_encoded_again_by_the_vae_of_its_own_latents(client, model):
    made = one_sampler(3, vae=["other", 0])
    made["model"]["inputs"]["preset"] = "krea-realtime"
    made["other"] = loaders(vae=model)["vae"]
    with pytest.raises(PromptFailed, match="The VAE is that of Wan 2.2 5B, and the model has the latents of Wan 2.1"):
        client.run(made)


def test_sampling_decoding_and_encoding(client, model):
    outputs = client.run(graph())
    made = saved_latent(client, outputs)
    assert made.shape == (1, 48, 4, 4, 4)
    video = read_video(client.view(first_file({"save video": outputs["save video"]}, ".mp4")))
    assert video.frames.shape == (13, 64, 64, 3) and video.rate == 24 and video.frames.std() > 5

    again = graph(state=["first", 1]) | {"first": sample(2)}
    again["video"]["inputs"] |= chosen("fps", "this many", rate=8)
    again["images"] = node("RollingKVDecodeImages", vae=["vae", 0], latent=["sample", 0])
    again["encoded"] = node("RollingKVEncodeVideo", vae=["vae", 0], images=["images", 0], width=64, height=96)
    again |= {"save images": save_images("images"), "save encoded": save_latent("encoded")}
    outputs = client.run(again)
    assert torch.equal(saved_latent(client, outputs)[:, :, :4], made)
    assert saved_images(client, outputs, "save images").shape == (29, 64, 64, 3)
    assert saved_latent(client, outputs, "save encoded").shape == (1, 48, 8, 6, 4)
    assert read_video(client.view(first_file({"save video": outputs["save video"]}, ".mp4"))).rate == 8


def test_a_marked_prompt_is_a_cut_and_an_image_lies_in_the_first_chunk(client, model, tmp_path):
    """As the engine has both, for the same model."""
    made = graph(initial_latent=["start", 0]) | {
        "image": node("LoadImage", image="example.png"),
        "start": node("RollingKVEncodeVideo", vae=["vae", 0], images=["image", 0], width=64, height=64),
        "shot": prompt("The scene transitions. a blue square"),
        "second": sample(2, positive="shot", state=["sample", 1]),
        "plain": sample(2, positive="bare", state=["sample", 1]),
        "bare": prompt("a blue square"),
    }
    made |= {f"save {name}": save_latent(name) for name in ("start", "second", "plain")}
    outputs = client.run(made)
    first = saved_latent(client, outputs)
    start, shot, plain = (saved_latent(client, outputs, f"save {name}") for name in ("start", "second", "plain"))
    assert first.shape == (1, 48, 4, 4, 4) and shot.shape == plain.shape == (1, 48, 8, 4, 4)
    torch.testing.assert_close(first[:, :, :1], start, atol=1e-4, rtol=1e-4)

    folder = make_tiny(tmp_path / "tiny", geometry=WAN_22)
    engine, text = load_model(folder), load_text_encoder(folder)
    begun, after = text.encode_shot("The scene transitions. a blue square", engine.preset.cut_marker)
    with RollingSession(engine, text.encode(["a red circle moving right"]), height=64, width=64) as session:
        session.prefill(to_model(start))
        list(session.generate(2, seed=1))
        assert session.state.records[0].given == 1
        session.set_prompt(begun, switch="cut", after=after)
        list(session.generate(2, seed=1))
    expected = to_raw(session.state.latents().float())
    torch.testing.assert_close(shot, expected, atol=0.05, rtol=0)  # another version of PyTorch
    assert (plain - expected)[:, :, 4:].abs().max() > 0.3


@pytest.mark.traceback_expected
def test_what_belongs_to_wan_2_1_is_refused_with_both_names(client, model):
    mixed = graph() | {"vae": loaders()["vae"]}
    with pytest.raises(PromptFailed, match=r"(?s)decodes Wan 2.1 video latents.*\[1, 48, 4, 4, 4\] \(of Wan 2.2 5B\)"):
        client.run(mixed)
    mixed = graph(initial_latent=["start", 0]) | {"other vae": loaders()["vae"]}
    mixed["image"] = node("LoadImage", image="example.png")
    mixed["start"] = node("RollingKVEncodeVideo", vae=["other vae", 0], images=["image", 0], width=64, height=64)
    with pytest.raises(PromptFailed, match=r"(?s)must be a Wan 2.2 5B video latent.*\(of Wan 2.1\).*Wan 2.2 5B VAE"):
        client.run(mixed)
    with pytest.raises(PromptFailed, match="height must be a multiple of 32 pixels, got 48"):
        client.run(graph(size=48))


SCRIPT = """
import json, sys
import torch
import comfy.cli_args

comfy.cli_args.args.cpu = True
from safetensors.torch import load_file, save_file
from comfy.latent_formats import Wan22
from comfy.ldm.wan.vae2_2 import WanVAE

given, made = sys.argv[1:]
tensors = load_file(given)
raw, pixels = tensors.pop("raw"), tensors.pop("pixels")
vae = WanVAE(dim=4, dec_dim=4, z_dim=48, temperal_downsample=[False, True, True]).eval()
vae.load_state_dict(tensors)
with torch.no_grad():
    result = {"frames": vae.decode(raw), "latents": vae.encode(pixels), "model": Wan22().process_in(raw)}
save_file({name: tensor.contiguous() for name, tensor in result.items()}, made)
print(json.dumps([Wan22().latents_mean.flatten().tolist(), Wan22().latents_std.flatten().tolist()]))
"""


def test_comfyui_has_the_same_latents_and_vae(install, tmp_path):
    """Its VAE Decode and Encode build this class; its samplers normalise latents so."""
    stock, raw, video = make_vae_22(), latents(3, channels=48), pixels(9, height=32, width=64)
    save_file(originals_of(stock) | {"raw": raw, "pixels": video}, tmp_path / "given.safetensors")
    ended = subprocess.run(
        [install.python, "-c", SCRIPT, tmp_path / "given.safetensors", tmp_path / "made.safetensors"],
        cwd=install.path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    mean, std = map(torch.tensor, json.loads(ended.stdout.splitlines()[-1]))
    assert torch.equal(mean, torch.tensor(LATENTS_MEAN_22)) and torch.equal(std, torch.tensor(LATENTS_STD_22))
    theirs, vae = load_file(tmp_path / "made.safetensors"), WanVAE(stock)
    torch.testing.assert_close(vae.decoder().decode(raw), theirs["frames"].clamp(-1, 1), atol=5e-3, rtol=0)
    torch.testing.assert_close(vae.encode_video(video), theirs["latents"], atol=1e-4, rtol=1e-4)
