"""The VAE: streams equal the stock codec bit for bit, and errors say what is wrong."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import convolutions_round
from torch.utils._python_dispatch import TorchDispatchMode
from vaes import (
    REFERENCE,
    REFERENCE_22,
    STOCK,
    STOCK_22,
    frame_by_frame,
    latents,
    make_vae,
    make_vae_22,
    pixels,
)

from rolling_kv.devices import OutOfMemory
from rolling_kv.platforms import Platform
from rolling_kv.vae.latents import to_model, to_raw
from rolling_kv.vae.shortage import telling_decoding_shortage
from rolling_kv.vae.taehv import Taehv, TinyVAE
from rolling_kv.vae.wan import WanVAE, streamline


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt, which is a BaseException too."""


def full_decode(raw: torch.Tensor) -> torch.Tensor:
    return REFERENCE.decode(raw).sample


def full_encode(video: torch.Tensor) -> torch.Tensor:
    return REFERENCE.encode(video).latent_dist.mode()


BOTH = pytest.mark.parametrize(
    ("stock", "reference"), [(STOCK, REFERENCE), (STOCK_22, REFERENCE_22)], ids=["2.1", "2.2"]
)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
@BOTH
def test_streaming_decode_equals_the_full_one(stock, reference, chunks):
    geometry = WanVAE(stock).geometry
    raw = latents(sum(chunks), channels=geometry.channels)
    stream = WanVAE(stock).decoder()
    parts = [stream.decode(chunk) for chunk in raw.split(chunks, dim=2)]
    size = 2 * geometry.spatial, 4 * geometry.spatial
    assert [part.shape[2:] for part in parts] == [(4 * n - (i == 0) * 3, *size) for i, n in enumerate(chunks)]
    full = reference.decode(raw).sample
    assert (full.abs() == 1).any() and (full.abs() < 1).any()
    assert torch.equal(torch.cat(parts, 2), full)
    # `make_vae` magnifies rounding forty times.
    torch.testing.assert_close(full, stock.decode(raw).sample, atol=5e-3, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
@BOTH
def test_streaming_encode_equals_the_full_one(stock, reference, chunks):
    geometry = WanVAE(stock).geometry
    sizes = [1 + 4 * chunks[0]] + [4 * n for n in chunks[1:] if n]
    video = pixels(sum(sizes), height=2 * geometry.spatial, width=4 * geometry.spatial)
    stream = WanVAE(stock).encoder()
    encoded = torch.cat([stream.encode(piece) for piece in video.split(sizes, dim=2)], 2)
    assert encoded.shape[1:] == (geometry.channels, 1 + sum(chunks), 2, 4)
    assert torch.equal(encoded, reference.encode(video).latent_dist.mode())


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


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [((3, 3, 3), 1, 1), ((3, 1, 1), 1, (1, 0, 0)), ((3, 1, 1), (2, 1, 1), 0), ((1, 1, 1), 1, 0)],
)
def test_a_convolution_of_pictures_is_that_of_the_video(kernel, stride, padding):
    class Dimensions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "convolution" in str(function):
                seen.append(args[0].ndim)
            return function(*args, **kwargs or {})

    seen: list[int] = []
    conv = WanCausalConv3d(4, 6, kernel, stride, padding).requires_grad_(False)
    x, before = torch.randn(2, 4, 5, 8, 6), torch.randn(2, 4, 2, 8, 6)
    stock, half = [conv(x), conv(x, before)], copy.deepcopy(conv).bfloat16()
    streamline(torch.nn.ModuleList([conv, half]))
    with Dimensions():
        ours = [conv(x), conv(x, before)]
        half(x.bfloat16())
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert seen == [4] * (2 * kernel[0]) + [5], "pictures in float32, a video in half precision"


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
@pytest.mark.parametrize("activated", [False, True], ids=["alone", "with the activation behind it"])
def test_a_norm_in_half_precision_is_as_near_to_the_exact_one_as_the_stock_one(dtype, activated):
    def seen(vae, computed):
        decoder = vae.decoder
        norm = decoder.norm_out if activated else decoder.mid_block.attentions[0].norm
        x = torch.randn(1, len(norm.gamma), 6, 5, generator=torch.Generator().manual_seed(3)) * 9
        x = x.to(dtype).to(computed)
        return decoder.nonlinearity(norm(x[:, :, None])) if activated else norm(x)

    vae = make_vae()
    exact, half = seen(vae, torch.float64), copy.deepcopy(vae).to(dtype)
    stock = seen(half, dtype)
    streamline(half)
    ours = seen(half, dtype)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= (stock.double() - exact).abs().max()


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
