"""Every layout of a VAE's file loads, and a file that is none says what is wrong."""

import json
import pickle
import re
import socket

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from vaes import (
    STOCK,
    STOCK_22,
    frame_by_frame,
    latents,
    make_vae,
    make_vae_22,
    originals_of,
    tensors_of,
)

from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.geometry import WAN_21, WAN_22
from rolling_kv.platforms import Platform
from rolling_kv.vae.loading import load_vae
from rolling_kv.vae.wan import WanVAE


def assert_same(ours: torch.Tensor, stock: torch.Tensor):
    """Up to rounding, which `make_vae` magnifies forty times: loaded VAEs are streamlined."""
    torch.testing.assert_close(ours, stock, atol=1e-3, rtol=0)


def write_layout(layout: str, vae: AutoencoderKLWan, folder):
    if layout == "folder":
        vae.save_pretrained(folder)
        return folder
    if layout == "pipeline":
        vae.save_pretrained(folder / "vae")
        return folder
    file = folder / ("vae.pth" if layout.endswith("pth") else "vae.safetensors")
    tensors = tensors_of(vae) if layout == "diffusers" else originals_of(vae)
    if layout == "prefixed pth":
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    torch.save(tensors, file) if file.suffix == ".pth" else save_file(tensors, file)
    return file


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("loading asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("layout", ["folder", "pipeline", "diffusers", "original", "pth", "prefixed pth"])
@pytest.mark.parametrize("config", [{}, {"base_dim": 8, "decoder_base_dim": 4}], ids=["equal", "wide encoder"])
def test_every_layout_gives_the_same_vae(layout, config, tmp_path, offline):
    vae = make_vae(**config)
    loaded = load_vae(str(write_layout(layout, vae, tmp_path)))
    assert loaded.vae.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in loaded.vae.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert_same(loaded.decoder().decode(latents(2)), frame_by_frame(vae).decode(latents(2)).sample)


@pytest.mark.parametrize("layout", ["folder", "pipeline", "diffusers", "original", "prefixed pth"])
def test_every_layout_of_the_vae_of_wan_2_2_loads(layout, tmp_path, offline):
    vae = make_vae_22(decoder_base_dim=8)
    loaded = load_vae(write_layout(layout, vae, tmp_path), geometry=WAN_22)
    assert loaded.geometry is WAN_22
    assert loaded.vae.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in loaded.vae.state_dict().items())
    raw = latents(2, channels=48)
    assert_same(loaded.decoder().decode(raw), frame_by_frame(vae).decode(raw).sample)


def test_the_vae_of_another_kind_of_model_is_refused_with_both_names(tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file(originals_of(STOCK), file)
    with pytest.raises(CheckpointError, match="the Wan 2.1 VAE, with 16 .* of Wan 2.2 5B, with 48.*wan2.2_vae"):
        load_vae(file, geometry=WAN_22)
    save_file(tensors_of(STOCK_22), file)
    with pytest.raises(CheckpointError, match="the Wan 2.2 5B VAE, with 48 .* of Wan 2.1, with 16.*wan_2.1_vae"):
        load_vae(file, geometry=WAN_21)


def test_a_folder_may_have_another_architecture(tmp_path):
    vae = make_vae(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=0)
    vae.save_pretrained(tmp_path)
    assert_same(load_vae(tmp_path).decoder().decode(latents(2)), frame_by_frame(vae).decode(latents(2)).sample)


def test_a_folder_with_other_statistics_is_refused(tmp_path):
    make_vae(latents_std=[1.0] * 16).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"its latents_std .* not that of Wan 2.1.*\[1.0, 1.0"):
        load_vae(tmp_path)


def test_dtype_is_the_files_own_unless_chosen(tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in originals_of(STOCK).items()}, file)
    assert {p.dtype for p in load_vae(file).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_vae(file, dtype="float32").parameters()} == {torch.float32}
    assert {p.dtype for p in load_vae(file, dtype=torch.float16).parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="got 'int8'"):
        load_vae(file, dtype="int8")


def test_missing_paths_and_foreign_folders(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: there is no such file or folder"):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_vae(tmp_path)


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.pth"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.999])
def test_truncated_files(name, kept, tmp_path):
    file = tmp_path / name
    torch.save(originals_of(STOCK), file) if name.endswith("pth") else save_file(originals_of(STOCK), file)
    data = file.read_bytes()
    file.write_bytes(data[: kept if kept in (0, 5) else int(kept * len(data))])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_vae(file)


class Payload:
    def __reduce__(self):
        return (open, ("executed.txt", "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Payload()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="can run code|damaged"):
            load_vae(tmp_path / name)
    assert not (tmp_path / "executed.txt").exists()


def test_other_models_are_named(tmp_path):
    file = tmp_path / "vae.safetensors"
    others = {
        "decoder.conv_in.weight": "a VAE of another family",
        "blocks.0.self_attn.q.weight": "a Wan video model",
        "anything": r"something unknown .*anything \[4, 3\]",
    }
    for name, said in others.items():
        save_file({name: torch.zeros(4, 3)}, file)
        with pytest.raises(CheckpointError, match=f"{said}.*, not a Wan 2.1 VAE"):
            load_vae(file)
    for tensors in (tensors_of(make_vae(z_dim=24)), originals_of(make_vae(z_dim=24))):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match="another VAE, with 24 latent channels"):
            load_vae(file)


@pytest.mark.parametrize("named", [tensors_of, originals_of])
def test_missing_surplus_and_misshapen_tensors_are_listed(named, tmp_path):
    tensors = named(STOCK)
    gone = next(name for name in tensors if name.startswith("decoder") and name.endswith("time_conv.weight"))
    shape = re.escape(str(list(tensors.pop(gone).shape)))
    save_file(tensors | {"extra.weight": torch.zeros(2, 3)}, tmp_path / "vae.safetensors")
    said = rf"1 missing: .*time_conv.weight {shape}; 1 that do not belong there: extra.weight \[2, 3\]"
    with pytest.raises(CheckpointError, match=said):
        load_vae(tmp_path / "vae.safetensors")
    bent = next(name for name in tensors if name.endswith("to_qkv.bias"))
    save_file(named(STOCK) | {bent: torch.zeros(7)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of the wrong shape: .*to_qkv.bias \[7\], expected \[48\]"):
        load_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    "config, said",
    [
        ({"num_res_blocks": 10**7}, "num_res_blocks must be at most 16"),
        ({"base_dim": "4"}, "base_dim must be a whole number, got '4'"),
        ({"dim_mult": [1, "\x1b"]}, "each entry of dim_mult must be a whole number"),
        ({"dim_mult": 5}, "dim_mult must be a list"),
        ({"temperal_downsample": [True]}, "one entry less than its dim_mult"),
        ({"latents_mean": 5}, "latents_mean in config.json is not that"),
    ],
)
def test_settings_of_a_folder_are_checked(config, said, tmp_path):
    make_vae().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(CheckpointError, match=said):
        load_vae(tmp_path)


def test_values_that_are_no_numbers_end_loading_and_decoding(tmp_path):
    tensors = originals_of(STOCK)
    name = next(name for name in tensors if name.startswith("decoder.") and name.endswith("weight"))
    save_file(tensors | {name: tensors[name] * float("nan")}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="hold values that are no numbers"):
        load_vae(tmp_path / "vae.safetensors")
    save_file({name: tensor.int() for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="quantised in a way that is not read here"):
        load_vae(tmp_path / "vae.safetensors")
    stream = WanVAE(make_vae()).decoder()
    with pytest.raises(ValueError, match="decoding gives values that are no numbers"):
        stream.decode(latents(1) * float("inf"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_convolutions_lie_channels_last_also_when_moved(tmp_path, dtype):
    path = tmp_path / "vae.safetensors"
    save_file(STOCK.state_dict(), path)
    plain = load_vae(path, dtype=dtype)
    vae = load_vae(path, dtype=dtype, runs_on="cuda")
    with torch.inference_mode():
        vae._apply(torch.clone)  # as ComfyUI moves it
    weight = vae.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(torch.equal(mine, stock) for mine, stock in zip(vae.parameters(), plain.parameters()))
    latents = torch.randn(1, 16, 1, 2, 2)
    torch.testing.assert_close(vae.decoder().decode(latents), plain.decoder().decode(latents), atol=0.03, rtol=0)


def test_auto_is_float32_where_there_is_no_bfloat16(tmp_path, monkeypatch):
    path = tmp_path / "vae.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in STOCK.state_dict().items()}, path)
    assert load_vae(path, runs_on="cuda").vae.dtype == torch.bfloat16
    monkeypatch.setattr("rolling_kv.checkpoints.dtypes.platform_of", lambda device: Platform("cuda", (7, 5)))
    assert load_vae(path, runs_on="cuda").vae.dtype == torch.float32
