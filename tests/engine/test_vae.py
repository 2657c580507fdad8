"""The VAE: streams equal the stock codec bit for bit, every file layout loads, and errors say what is wrong."""

import copy
import json
import pickle
import re
import socket

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import convolutions_round
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.devices import OutOfMemory
from rolling_kv.geometry import GEOMETRIES, WAN_21, WAN_22
from rolling_kv.platforms import Platform
from rolling_kv.vae.latents import LATENTS_MEAN, LATENTS_STD, STATISTICS, to_model, to_raw
from rolling_kv.vae.loading import ARCHITECTURES, load_vae
from rolling_kv.vae.shortage import telling_decoding_shortage
from rolling_kv.vae.taehv import Taehv, TinyVAE
from rolling_kv.vae.wan import WanVAE, streamline


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt, which is a BaseException too."""


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


def full_decode(raw: torch.Tensor) -> torch.Tensor:
    return REFERENCE.decode(raw).sample


def full_encode(video: torch.Tensor) -> torch.Tensor:
    return REFERENCE.encode(video).latent_dist.mode()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_streaming_decode_equals_the_full_one(chunks):
    raw = latents(sum(chunks))
    stream = WanVAE(STOCK).decoder()
    parts = [stream.decode(chunk) for chunk in raw.split(chunks, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - (i == 0) * 3 for i, n in enumerate(chunks)]
    full = full_decode(raw)
    assert (full.abs() == 1).any() and (full.abs() < 1).any()
    assert torch.equal(torch.cat(parts, 2), full)
    # `make_vae` magnifies rounding forty times.
    torch.testing.assert_close(full, STOCK.decode(raw).sample, atol=5e-3, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_streaming_encode_equals_the_full_one(chunks):
    sizes = [1 + 4 * chunks[0]] + [4 * n for n in chunks[1:] if n]
    video = pixels(sum(sizes))
    stream = WanVAE(STOCK).encoder()
    parts = [stream.encode(piece) for piece in video.split(sizes, dim=2)]
    assert torch.equal(torch.cat(parts, 2), full_encode(video))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_the_vae_of_wan_2_2_decodes_in_a_stream(chunks):
    raw = latents(sum(chunks), channels=48)
    stream = WanVAE(STOCK_22).decoder()
    parts = [stream.decode(chunk) for chunk in raw.split(chunks, dim=2)]
    assert [part.shape[2:] for part in parts] == [(4 * n - (i == 0) * 3, 32, 64) for i, n in enumerate(chunks)]
    full = REFERENCE_22.decode(raw).sample
    assert (full.abs() == 1).any() and (full.abs() < 1).any()
    assert torch.equal(torch.cat(parts, 2), full)
    torch.testing.assert_close(full, STOCK_22.decode(raw).sample, atol=5e-3, rtol=0)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_the_vae_of_wan_2_2_encodes_in_a_stream(chunks):
    sizes = [1 + 4 * chunks[0]] + [4 * n for n in chunks[1:] if n]
    video = pixels(sum(sizes), height=32, width=64)
    stream = WanVAE(STOCK_22).encoder()
    encoded = torch.cat([stream.encode(piece) for piece in video.split(sizes, dim=2)], 2)
    assert encoded.shape[1:] == (48, 1 + sum(chunks), 2, 4)
    assert torch.equal(encoded, REFERENCE_22.encode(video).latent_dist.mode())


def test_bfloat16_and_batches_stream_too():
    vae = load_stock(torch.bfloat16)
    raw = torch.cat([latents(4, seed=1), latents(4, seed=2)])
    stream = WanVAE(vae).decoder()
    frames = torch.cat([stream.decode(raw[:, :, :3]), stream.decode(raw[:, :, 3:])], 2)
    assert frames.dtype == torch.float32
    assert torch.equal(frames, frame_by_frame(vae).decode(raw.bfloat16()).sample.float())


def load_stock(dtype):
    vae = make_vae()
    with torch.device("meta"):
        other = AutoencoderKLWan.from_config(vae.config)
    other.load_state_dict({name: tensor.to(dtype) for name, tensor in vae.state_dict().items()}, assign=True)
    return other


def test_long_videos_do_not_depend_on_the_cut():
    raw = latents(12, height=30, width=2)
    video = pixels(45, height=240, width=8)
    vae = WanVAE(STOCK)
    one_by_one, by_three = vae.decoder(), vae.decoder()
    frames = torch.cat([one_by_one.decode(chunk) for chunk in raw.split(1, 2)], 2)
    assert torch.equal(frames, torch.cat([by_three.decode(chunk) for chunk in raw.split(3, 2)], 2))
    one_by_one, by_two = vae.encoder(), vae.encoder()
    encoded = torch.cat([one_by_one.encode(piece) for piece in video.split([1] + [4] * 11, 2)], 2)
    assert torch.equal(encoded, torch.cat([by_two.encode(piece) for piece in video.split([5] + [8] * 5, 2)], 2))
    assert (encoded - STOCK.encode(video).latent_dist.mode()).abs().max() < 1e-5


def test_streams_interleave_and_leave_the_stock_module_alone():
    first, second = latents(5, seed=1), latents(5, height=2, width=2, seed=2)
    vae = WanVAE(STOCK)
    a, b, encoder = vae.decoder(), vae.decoder(), vae.encoder()
    expected = full_decode(first), full_decode(second), full_encode(pixels(9))
    STOCK._feat_map = untouched = ["mine"]
    frames_a, frames_b = [a.decode(first[:, :, :2])], [b.decode(second[:, :, :1])]
    encoded = [encoder.encode(pixels(9)[:, :, :5])]
    frames_a.append(a.decode(first[:, :, 2:]))
    encoded.append(encoder.encode(pixels(9)[:, :, 5:]))
    frames_b.append(b.decode(second[:, :, 1:]))
    assert STOCK._feat_map is untouched and untouched == ["mine"]
    assert all(torch.equal(torch.cat(got, 2), want) for got, want in zip((frames_a, frames_b, encoded), expected))


@pytest.mark.parametrize("make", [make_vae, make_vae_22])
@pytest.mark.parametrize("cuts", [[5], [1, 1, 3], [2, 3]])
def test_a_frame_is_encoded_again_as_a_picture(make, cuts):
    """The very last pixel frame of what has been decoded so far, whatever the cut."""
    vae = WanVAE(make())
    latents = torch.randn(2, vae.geometry.channels, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    again, end = vae.reencoder(), 0
    pixels = vae.decoder().decode(to_raw(latents))
    for piece in latents.split(cuts, dim=2):
        end += piece.shape[2]
        made = again(piece)
        expected = vae.encode_video(pixels[:, :, 4 * end - 4 : 4 * end - 3])
        assert made.shape == (2, vae.geometry.channels, 1, 4, 6)
        assert torch.equal(made, to_model(expected))


def test_decoding_can_pause_after_any_frame():
    raw = latents(5)
    stream = WanVAE(STOCK).decoder()
    frames = stream.decode_frames(raw)
    parts = [next(frames), next(frames)]
    frames.close()
    assert torch.equal(torch.cat([*parts, stream.decode(raw[:, :, 2:])], 2), full_decode(raw))


def test_an_interrupt_inside_a_frame_ends_only_that_stream():
    raw = latents(4)
    vae = WanVAE(STOCK)
    broken, other = vae.decoder(), vae.decoder()
    broken.decode(raw[:, :, :2])
    before = other.decode(raw[:, :, :1])

    def interrupt(*_):
        raise Cancelled

    hook = STOCK.decoder.up_blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(Cancelled):
        broken.decode(raw[:, :, 2:])
    hook.remove()
    with pytest.raises(RuntimeError, match="start a new one"):
        broken.decode(raw[:, :, 2:])
    assert torch.equal(torch.cat([before, other.decode(raw[:, :, 1:])], 2), full_decode(raw))


def test_encode_video_trims_to_whole_latent_frames():
    video = pixels(12)
    encoded = WanVAE(STOCK).encode_video(video)
    assert torch.equal(encoded, full_encode(video[:, :, :9]))


@pytest.mark.parametrize("count", [1, 4, 5, 12, 13])
def test_frames_that_come_one_by_one_are_encoded_as_they_come(count):
    video, read = pixels(count), []

    def frames():
        for index, frame in enumerate(video.split(1, dim=2)):
            read.append(index)
            yield frame

    latents = []
    for latent in WanVAE(STOCK).encode_frames(frames()):
        latents.append(latent)
        assert len(read) == 4 * len(latents) - 3  # no frame is waited for that it does not need
    assert torch.equal(torch.cat(latents, 2), WanVAE(STOCK).encode_video(video))


@pytest.mark.parametrize(
    "counts, message",
    [([4], "1 \\+ 4n frames, got 4: leave out the last 3 or give 1 more"),
     ([5, 5], "4n frames after the first call, got 5: leave out the last 1 or give 3 more")],
)  # fmt: skip
def test_wrong_frame_counts_are_refused(counts, message):
    stream = WanVAE(STOCK).encoder()
    for count in counts[:-1]:
        stream.encode(pixels(count))
    with pytest.raises(ValueError, match=message):
        stream.encode(pixels(counts[-1]))


def test_wrong_shapes_are_refused_without_harm():
    raw = latents(3)
    stream = WanVAE(STOCK).decoder()
    with pytest.raises(ValueError, match=r"\[B, 16, F, H, W\], got \[1, 8, 3, 2, 4\]"):
        stream.decode(raw[:, :8])
    start = stream.decode(raw[:, :, :1])
    with pytest.raises(ValueError, match=r"\[1, 2, 2\], but the stream began with \[1, 2, 4\]"):
        stream.decode(raw[..., :2])
    assert torch.equal(torch.cat([start, stream.decode(raw[:, :, 1:])], 2), full_decode(raw))
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 12x24"):
        WanVAE(STOCK).encoder().encode(pixels(1, height=12))
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 16x24"):
        WanVAE(STOCK_22).encoder().encode(pixels(1))
    with pytest.raises(ValueError, match=r"\[B, 48, F, H, W\], got \[1, 16, 3, 2, 4\]"):
        WanVAE(STOCK_22).decoder().decode(raw)


def test_latent_statistics_are_those_of_the_stock_vae():
    assert list(LATENTS_MEAN) == STOCK.config.latents_mean and list(LATENTS_STD) == STOCK.config.latents_std
    raw = latents(2)
    assert torch.allclose(to_raw(to_model(raw)), raw, atol=1e-6)
    shaped = to_model(torch.tensor(LATENTS_MEAN).view(1, 16, 1, 1, 1) + torch.tensor(LATENTS_STD).view(1, 16, 1, 1, 1))
    assert torch.allclose(shaped, torch.ones_like(shaped), atol=1e-5)


def test_each_kind_of_latents_has_its_own_statistics():
    for channels in GEOMETRIES:
        raw = latents(2, channels=channels)
        assert torch.allclose(to_raw(to_model(raw)), raw, atol=1e-6)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in STATISTICS[channels])
        assert torch.allclose(to_model(mean + std), torch.ones(1, channels, 1, 1, 1), atol=1e-5)


def test_the_holder_takes_a_device_attribute():
    vae = WanVAE(STOCK)
    vae.device = torch.device("cpu")
    assert vae.decoder().decode(latents(1)).shape == (1, 3, 1, 16, 32)


def test_memory_estimate_grows_with_pixels_and_element_size():
    vae, half = WanVAE(STOCK), WanVAE(load_stock(torch.bfloat16))
    assert vae.decode_bytes(480, 832) == 4 * vae.decode_bytes(240, 416) == 2 * half.decode_bytes(480, 832)
    assert vae.encode_bytes(480, 832, batch=2) == 2 * vae.encode_bytes(480, 832)
    for each in (vae, WanVAE(STOCK_22)):
        kept = [t for t in stream_features(each) if isinstance(t, torch.Tensor)]
        assert sum(t.nbytes for t in kept) < each.decode_bytes(*each.geometry.pixel_size(2, 4))


def stream_features(vae):
    stream = vae.decoder()
    stream.decode(latents(3, channels=vae.geometry.channels))
    return stream._features


@pytest.mark.parametrize("make", [make_vae, make_vae_22], ids=["2.1", "2.2"])
def test_a_streamlined_vae_makes_the_same_up_to_rounding(make):
    vae = make()
    stock, channels = copy.deepcopy(vae), vae.config.z_dim
    for module in vae.modules():
        if hasattr(module, "gamma"):
            module.gamma += torch.rand(module.gamma.shape)
    stock.load_state_dict(vae.state_dict())
    streamline(vae)
    raw, given = latents(3, channels=channels), pixels(5, 32, 64)
    ours, theirs = (list(WanVAE(each).decoder().decode_frames(raw)) for each in (vae, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # `make_vae` magnifies rounding forty times
    torch.testing.assert_close(
        WanVAE(vae).encoder().encode(given), WanVAE(stock).encoder().encode(given), atol=1e-4, rtol=0
    )
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in vae.state_dict().items())
    again = copy.deepcopy(vae)
    for module in again.modules():
        if hasattr(module, "gamma"):
            module.gamma.zero_()
    assert not torch.equal(WanVAE(again).decoder().decode(raw), torch.cat(ours, 2)), "a copy has norms of its own"


@pytest.mark.parametrize("make", [make_vae, make_vae_22], ids=["2.1", "2.2"])
def test_a_streamlined_vae_copies_no_picture_for_its_margin_or_its_precision(make):
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **kwargs or {})

    copies, vae = [], make().to(torch.bfloat16)
    for each in (copy.deepcopy(vae), vae):
        if each is vae:
            streamline(vae)
        stream, raw = WanVAE(each).decoder(), latents(4, channels=vae.config.z_dim)
        with torch.inference_mode():
            stream.decode(raw[:, :, :3])
            made: list[str] = []
            with Copies():
                stream.decode(raw[:, :, 3:])
        copies.append(sum("pad" in name or "type_as" in name for name in made))
    assert copies[0] > 10 and copies[1] == 0


def test_a_streamlined_norm_of_nothing_is_nothing():
    vae = make_vae()
    streamline(vae)
    assert torch.equal(vae.decoder.norm_out(torch.zeros(1, 4, 1, 2, 2)), torch.zeros(1, 4, 1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_in_half_precision_is_as_near_to_the_exact_one_as_the_stock_one(dtype):
    vae, x = make_vae(), torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(3)) * 9
    exact, half = vae.decoder.norm_out(x.to(dtype).double()), copy.deepcopy(vae).to(dtype)
    stock = half.decoder.norm_out(x.to(dtype))
    streamline(half)
    ours = half.decoder.norm_out(x.to(dtype))
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= (stock.double() - exact).abs().max()


def test_only_half_precision_is_loaded_streamlined(tmp_path):
    file = write_layout("original", make_vae(), tmp_path)
    layouts = [
        load_vae(file, dtype=dtype).vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
        for dtype in ("float32", "bfloat16")
    ]
    assert layouts == [False, True]


def test_memory_that_ends_while_decoding_is_told_with_what_helps():
    vae = WanVAE(STOCK)
    with pytest.raises(
        OutOfMemory, match=r"decoding 832x480 takes about \d+\.\d GiB.*can be had.*tiny decoder, taew2_1.*; tile it$"
    ):
        with telling_decoding_shortage(vae, 480, 832, "tile it"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="^else$"), telling_decoding_shortage(vae, 480, 832):
        raise ValueError("else")
    tiny = TinyVAE(Taehv(16, (8, 6, 4, 4), (1, 2, 2), 1))
    with pytest.raises(OutOfMemory, match="What helps: tile it$"), telling_decoding_shortage(tiny, 64, 64, "tile it"):
        raise MemoryError


# ---- files


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
    assert torch.equal(loaded.decoder().decode(latents(2)), frame_by_frame(vae).decode(latents(2)).sample)


@pytest.mark.parametrize("layout", ["folder", "pipeline", "diffusers", "original", "prefixed pth"])
def test_every_layout_of_the_vae_of_wan_2_2_loads(layout, tmp_path, offline):
    vae = make_vae_22(decoder_base_dim=8)
    loaded = load_vae(write_layout(layout, vae, tmp_path), geometry=WAN_22)
    assert loaded.geometry is WAN_22
    assert loaded.vae.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in loaded.vae.state_dict().items())
    raw = latents(2, channels=48)
    assert torch.equal(loaded.decoder().decode(raw), frame_by_frame(vae).decode(raw).sample)


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
    assert torch.equal(load_vae(tmp_path).decoder().decode(latents(2)), frame_by_frame(vae).decode(latents(2)).sample)


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


def test_convolutions_in_float32_are_not_rounded(monkeypatch):
    monkeypatch.setattr("rolling_kv.platforms.platform_of", lambda device: Platform("cuda", (8, 0)))
    vae, seen = make_vae(), []
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(lambda *_: seen.append(convolutions_round()))
    holder = WanVAE(vae)
    frames = [convolutions_round() for _ in holder.decoder().decode_frames(torch.zeros(1, 16, 2, 2, 2))]
    holder.encode_video(torch.zeros(1, 3, 5, 16, 16))
    convolutions = sum(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
    assert len(seen) >= convolutions and not any(seen)
    assert frames == [True, True] and convolutions_round()  # between the frames, others may have it


@pytest.mark.parametrize("dtype, last", [("bfloat16", True), ("float32", False)])
def test_convolutions_lie_channels_last_where_cudnn_is_left_aside_otherwise(tmp_path, dtype, last):
    path = tmp_path / "vae.safetensors"
    save_file(STOCK.state_dict(), path)
    plain = load_vae(path, dtype=dtype)
    vae = load_vae(path, dtype=dtype, runs_on="cuda")
    with torch.inference_mode():
        vae._apply(torch.clone)  # as ComfyUI moves it
    weight = vae.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) is last
    assert all(torch.equal(mine, stock) for mine, stock in zip(vae.parameters(), plain.parameters()))
    latents = torch.randn(1, 16, 1, 2, 2)
    torch.testing.assert_close(vae.decoder().decode(latents), plain.decoder().decode(latents), atol=0.03, rtol=0)


def test_auto_is_float32_where_there_is_no_bfloat16(tmp_path, monkeypatch):
    path = tmp_path / "vae.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in STOCK.state_dict().items()}, path)
    assert load_vae(path, runs_on="cuda").vae.dtype == torch.bfloat16
    monkeypatch.setattr("rolling_kv.checkpoints.dtypes.platform_of", lambda device: Platform("cuda", (7, 5)))
    assert load_vae(path, runs_on="cuda").vae.dtype == torch.float32
