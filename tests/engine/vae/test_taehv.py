"""TAEHV's decoder, with random weights: as it reads files, and a stream of chunks against the plain formula for a whole video."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import conv2d, interpolate, pad, pixel_shuffle

from rolling_kv.bench.gauges import TensorBytes
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.geometry import WAN_21, WAN_22
from rolling_kv.vae.latents import to_model, to_raw
from rolling_kv.vae.loading import load_vae
from rolling_kv.vae.taehv import Taehv, TinyVAE, load_taehv

KINDS = {"2.1": (WAN_21, 16, 1), "2.2": (WAN_22, 48, 2)}


def weights(kind: str) -> dict[str, torch.Tensor]:
    """Of a decoder with few channels, and a tensor of the encoder beside them, as the files have."""
    _, channels, patch = KINDS[kind]
    torch.manual_seed(1)
    tensors = Taehv(channels, (8, 6, 4, 4), (1, 2, 2), patch).state_dict()
    return {name: tensor * 2 for name, tensor in tensors.items()} | {"encoder.0.weight": torch.ones(4, 3, 3, 3)}


def whole(tensors: dict[str, torch.Tensor], latents: torch.Tensor, patch: int) -> torch.Tensor:
    """All frames [T, 3, H, W] in [0, 1] of latents [f, C, h, w] at once, layer by layer, as TAEHV's own code has it."""

    def at(layer: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = tensors[f"decoder.{layer}.weight"], tensors.get(f"decoder.{layer}.bias")
        return conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    x = at("1", torch.tanh(latents / 3) * 3).relu()
    for first in (3, 9, 15):
        for layer in range(first, first + 3):
            before = pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            inner = at(f"{layer}.conv.0", torch.cat([x, before], dim=1)).relu()
            x = (at(f"{layer}.conv.4", at(f"{layer}.conv.2", inner).relu()) + x).relu()
        x = interpolate(x, scale_factor=2)
        grown = at(f"{first + 4}.conv", x)
        x = at(str(first + 5), grown.reshape(-1, x.shape[1], *x.shape[2:]))
    return pixel_shuffle(at("22", x.relu()), patch)[3:].clamp(0, 1)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("sizes", [[7], [1, 1, 5], [3, 3, 1]])
def test_a_stream_of_chunks_has_the_frames_of_the_whole_video(kind, sizes, tmp_path):
    geometry, channels, patch = KINDS[kind]
    tensors = weights(kind)
    torch.save(tensors, tmp_path / "taew.pth")
    latents = 2 * torch.randn(7, channels, 3, 4, generator=torch.Generator().manual_seed(2))
    stream = load_taehv(tmp_path / "taew.pth", geometry).stream()
    made = [list(stream.decode_frames(chunk.movedim(1, 0)[None])) for chunk in latents.split(sizes)]
    assert [len(frames) for frames in made] == sizes
    frames = torch.cat([frame for chunk in made for frame in chunk], dim=2)
    expected = whole(tensors, latents, patch)
    assert frames.shape == (1, 3, 25, 3 * geometry.spatial, 4 * geometry.spatial)
    assert 0.1 < expected.mean() < 0.9 and expected.std() > 0.05
    torch.testing.assert_close(frames[0].movedim(1, 0), expected * 2 - 1, rtol=0, atol=1e-4)


def test_both_kinds_of_file_and_every_precision_are_read(tmp_path):
    tensors = {name: tensor.half() for name, tensor in weights("2.1").items()}
    torch.save(tensors, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    one, other = (load_taehv(tmp_path / name, WAN_21).state_dict() for name in ("a.pth", "a.safetensors"))
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.float32 for name in one)
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    torch.save(narrow, tmp_path / "a.pth")
    read = load_taehv(tmp_path / "a.pth", WAN_21).state_dict()
    assert all(torch.equal(read[name], narrow[name].float()) for name in read)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {"decoder.mid.weight": torch.ones(2, 2)}, "holds no TAEHV decoder. Choose taew2_1 or taew2_2"),
        (lambda tensors: {**tensors, "decoder.7.conv.weight": torch.ones(4)}, "holds no TAEHV decoder"),
        (lambda tensors: {**tensors, "decoder.7.conv.weight": torch.ones(0, 0, 1, 1)}, "taew"),
        (lambda tensors: weights("2.2"), "this decodes 48 channels, 4 frames and 16 pixels a latent cell, and Wan 2.1 has 16, 4"),
        (lambda tensors: {**tensors, "decoder.13.conv.weight": torch.ones(6, 6, 1, 1)}, "16 channels, 2 frames and 8 pixels"),
        (lambda tensors: {name: tensors[name] for name in tensors if ".9." not in name}, "6 missing: decoder.9.conv.0.weight"),
        (lambda tensors: {**tensors, "decoder.22.bias": torch.tensor([0, 1, float("nan")])}, "no numbers|NaN|finite"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_name(change, message, tmp_path):
    torch.save(change(weights("2.1")), tmp_path / "taew.pth")
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_taehv(tmp_path / "taew.pth", WAN_21)
    assert "taew.pth" in str(refusal.value)


def written(kind: str, tmp_path, name: str = "taew.safetensors"):
    save_file(weights(kind), tmp_path / name)
    return tmp_path / name


def raw_latents(kind: str, batch: int = 1, frames: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return to_raw(2 * torch.randn(batch, KINDS[kind][1], frames, 3, 4, generator=generator))


def test_in_the_place_of_a_vae_it_decodes_raw_latents_of_several_videos(kind, tmp_path, caplog):
    vae = load_vae(written(kind, tmp_path))
    assert isinstance(vae, TinyVAE) and caplog.text.count("taew.safetensors is a tiny decoder") == 1
    geometry, latents = KINDS[kind][0], raw_latents(kind, batch=2)
    assert vae.geometry is geometry and vae.compute_device().type == "cpu"
    decoder = vae.decoder()
    frames = torch.cat([decoder.decode(part) for part in latents.split([1, 3, 1], dim=2)], dim=2)
    assert (
        frames.shape == (2, 3, geometry.pixel_frames(5), *geometry.pixel_size(3, 4)) and frames.dtype == torch.float32
    )
    for video, made in zip(to_model(latents), frames):
        expected = whole(weights(kind), video.movedim(0, 1), KINDS[kind][2])
        torch.testing.assert_close(made.movedim(0, 1), expected * 2 - 1, rtol=0, atol=1e-4)


def test_files_of_lightx2v_are_given_raw_latents(tmp_path):
    latents = raw_latents("2.1")
    light, plain = (load_vae(written("2.1", tmp_path, name)) for name in ("LightTAEw2_1.safetensors", "a.safetensors"))
    assert not torch.equal(light.decoder().decode(latents), plain.decoder().decode(latents))
    expected = whole(weights("2.1"), latents[0].movedim(0, 1), 1) * 2 - 1
    torch.testing.assert_close(light.decoder().decode(latents)[0].movedim(0, 1), expected, rtol=0, atol=1e-4)


def test_what_lies_further_back_than_it_reaches_changes_nothing(kind, tmp_path):
    vae = load_vae(written(kind, tmp_path))
    latents = raw_latents(kind, frames=vae.reach + 2)
    there, later, short = (vae.decoder().decode(latents[:, :, first:])[:, :, -4:] for first in (0, 1, 3))
    assert torch.equal(there, later) and not torch.equal(there, short)


def test_what_is_announced_is_enough_and_no_more_than_needed(kind):
    geometry, channels, patch = KINDS[kind]
    with torch.device("meta"):
        vae = TinyVAE(Taehv(channels, (256, 128, 64, 64), (1, 2, 2), patch).half())
    latents = torch.empty(1, channels, 1, *geometry.latent_size(480, 832), device="meta")
    with torch.inference_mode(), TensorBytes() as memory:
        stream = vae.taehv.stream()
        for _ in range(3):
            list(stream.decode_frames(latents))
    assert 1 < vae.decode_bytes(480, 832) / memory.peak < 1.5
    assert vae.decode_bytes(480, 832, batch=3) == 3 * vae.decode_bytes(480, 832)


def test_it_says_what_it_cannot_do(kind, tmp_path):
    vae = load_vae(written(kind, tmp_path))
    for ask in (lambda: vae.encode_bytes(480, 832), vae.encoder, vae.reencoder, lambda: vae.encode_frames([])):
        with pytest.raises(ValueError, match=f"cannot encode.*load {vae.geometry.name}'s VAE"):
            ask()
    decoder, latents = vae.decoder(), raw_latents(kind)
    decoder.decode(latents)
    with pytest.raises(ValueError, match="the stream began with"):
        decoder.decode(latents[..., :2])
    with pytest.raises(ValueError, match="no numbers"):
        vae.decoder().decode(latents * float("nan"))
    with pytest.raises(CheckpointError, match="taew.safetensors.*Choose taew2_1"):
        load_vae(tmp_path / "taew.safetensors", geometry=WAN_21 if kind == "2.2" else WAN_22)


@pytest.mark.parametrize(
    "dtype, runs_on, has", [("auto", None, "float32"), ("auto", "cuda", "float16"), ("bfloat16", "cuda", "bfloat16")]
)
def test_its_precision(dtype, runs_on, has, tmp_path):
    vae = load_vae(written("2.1", tmp_path), dtype=dtype, runs_on=runs_on)
    assert {tensor.dtype for tensor in vae.parameters()} == {getattr(torch, has)}
    assert vae.decoder().decode(raw_latents("2.1", frames=1)).dtype == torch.float32
