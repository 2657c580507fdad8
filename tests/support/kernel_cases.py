"""The Triton kernels against their plain paths. Run by test_kernels.py in a process of its own, where they are interpreted.

Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: there a value may be its neighbour, and what is counted
exactly is counted in float16.
"""

import copy

import pytest
import torch
from builders import tiny_transformer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm, silu
from vaes import latents, make_vae, make_vae_22, pixels

from rolling_kv.cache.codecs import CODECS
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.rope import rotary_rotations, rotate
from rolling_kv.sampling.session import RollingSession
from rolling_kv.vae import kernels as vae_kernels
from rolling_kv.vae import wan as vae_wan
from rolling_kv.vae.wan import WanVAE, streamline
from rolling_kv.wan import attachment, fused, kernels, processors, products
from rolling_kv.wan.fused import by_frame, half_modulated_norm, narrowed_sum
from rolling_kv.wan.offloaded import offload_blocks
from rolling_kv.wan.processors import normalise

few = settings(max_examples=8, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
dtypes = st.sampled_from([torch.bfloat16, torch.float16])
layouts = st.sampled_from(["", "transposed", "a part of more"])
counts, seeds = st.integers(1, 3), st.integers(0, 99)
head_dims = st.sampled_from([6, 12, 24, 32])


def some(shape, dtype, seed, layout=""):
    """Random [B, S, ...], with the memory in another order or of a larger tensor."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "transposed":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "a part of more":
        more = torch.zeros(shape[0], shape[1] + 3, *shape[2:], dtype=dtype)
        more[:, 2:-1] = values
        return more[:, 2:-1]
    return values


def rows(batch, dim, shared, seed, frames=1):
    """Scale, shift and gate as `modulation_of` gives them, float32; frames: with a row each."""
    made = some((1 if shared else batch, frames, 6, dim), torch.float32, seed).chunk(6, dim=2)
    return [by_frame(row) for row in (made[1] + 1, made[0], made[2])]


def assert_rounded_alike(made, plain, ulps=1):
    assert made.dtype == plain.dtype and made.shape == plain.shape and made.is_contiguous()
    eps = torch.finfo(plain.dtype).eps
    torch.testing.assert_close(made, plain, atol=1e-5, rtol=ulps * eps)
    assert plain.dtype == torch.bfloat16 or made.numel() < 100 or (made == plain).float().mean() >= 0.9


@few
@given(counts, counts, counts, st.integers(1, 70), dtypes, layouts, st.booleans(), seeds)
def test_normed(batch, tokens, frames, dim, dtype, layout, shared, seed):
    x = some((batch, frames * tokens, dim), dtype, seed, layout)
    scale, shift, _ = rows(batch, dim, shared, seed, frames)
    norm = torch.nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    made = kernels.normed(x, scale, shift, norm.eps)
    assert made.is_contiguous() and made.dtype == dtype
    plain = half_modulated_norm(x, norm, scale, shift)
    # Where scale and shift nearly cancel, the sum keeps the rounding of its parts.
    torch.testing.assert_close(made, plain, atol=1e-5 if dim > 1 else 1e-3, rtol=torch.finfo(dtype).eps)


@few
@given(
    counts, counts, counts, st.integers(2, 70), dtypes, layouts, layouts, st.booleans(), st.booleans(), st.booleans(), seeds
)  # fmt: skip
def test_summed_and_normed(batch, tokens, frames, dim, dtype, layout, other, shared, gated, one_affine, seed):
    """one_affine: a gate for each frame before a norm that has one row, as that of the cross-attention."""
    size = batch, frames * tokens, dim
    x, added = some(size, dtype, seed, layout), some(size, dtype, seed + 1, other)
    scale, shift, gate = rows(batch, dim, shared, seed, frames)
    if one_affine:
        scale, shift, _ = rows(1, dim, True, seed)
    before = x.clone(), added.clone()
    norm = torch.nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    total, made = kernels.summed_and_normed(x, added, gate if gated else None, scale, shift, norm.eps)
    plain = narrowed_sum(x, added, gate) if gated else x + added
    assert_rounded_alike(total, plain)
    torch.testing.assert_close(
        made, half_modulated_norm(total, norm, scale, shift), atol=1e-5, rtol=torch.finfo(dtype).eps
    )
    assert torch.equal(x, before[0]) and torch.equal(added, before[1])


def test_an_affine_norm_has_one_row():
    x, norm = some((2, 3, 20), torch.bfloat16, 0), torch.nn.LayerNorm(20)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        made = kernels.normed(x, norm.weight[None], norm.bias[None], norm.eps)
        torch.testing.assert_close(made, norm(x.float()).bfloat16(), atol=1e-5, rtol=2**-7)


def turn_of(heads, dim, batch, frames, start, weight_dtype, seed, own):
    """A turn for tokens of `frames` frames of 1 x 2 tokens, and the norm it is of. own: a rotation for each video."""
    norm = torch.nn.RMSNorm(heads * dim, eps=1e-6, dtype=weight_dtype)
    norm.weight.data = some((heads * dim,), torch.float32, seed).abs().add(0.5).to(weight_dtype)
    starts = range(start, start + batch) if own else [start]
    rotation = torch.stack([rotary_rotations(dim, at, frames, 1, 2, torch.complex64)[:, None] for at in starts])
    return kernels.Turn(norm.weight.detach(), norm.eps, rotation), norm


def plainly_turned(x, turn, norm):
    """In float32 all through, and as the plain path rounds it in between."""
    with torch.no_grad():
        exact = rotate(norm.float()(x.float().flatten(2)).unflatten(2, x.shape[2:]), turn.rotation)
        norm.to(turn.weight.dtype)
        stepwise = rotate(normalise(x.flatten(2), norm, False).unflatten(2, x.shape[2:]), turn.rotation)
    return exact, stepwise.to(x.dtype)


@few
@given(
    st.integers(1, 3), counts, head_dims, st.integers(1, 3), st.sampled_from([0, 7, 4000]), dtypes, layouts, st.booleans(),
    st.booleans(), seeds,
)  # fmt: skip
def test_turned(batch, heads, dim, frames, start, dtype, layout, wide_weight, own, seed):
    x = some((batch, 2 * frames, heads, dim), dtype, seed, layout)
    turn, norm = turn_of(heads, dim, batch, frames, start, torch.float32 if wide_weight else dtype, seed, own)
    made = turn.turned(x)
    exact, stepwise = plainly_turned(x, turn, norm)
    assert_rounded_alike(made, exact.to(dtype))
    # The plain path rounds between its steps: its error is of the size of the pair that it turns.
    allowed = 3 * torch.finfo(dtype).eps * exact.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    assert ((made.float() - stepwise.float()).abs() <= allowed + 1e-5).all()


@few
@given(
    st.sampled_from(sorted(CODECS)),
    st.integers(1, 2),
    counts,
    head_dims,
    st.integers(1, 4),
    st.integers(0, 7),
    dtypes,
    layouts,
    seeds,
)
def test_written_into_the_slots_and_read(storage, batch, heads, dim, frames, first, dtype, layout, seed):
    """A ring of 8 frames of two tokens: the segments wrap, and what lies beside them is left alone."""
    key, value = (some((batch, 2 * frames, heads, dim), dtype, seed + n, layout) for n in (0, 1))
    turn, norm = turn_of(heads, dim, batch, frames, 5, dtype, seed, own=False)
    codec = CODECS[storage](dtype)
    made = tuple(torch.ones(2, batch, 16, heads, width).to(kept) for width, kept in codec.widths(dim))
    plain = tuple(part.clone() for part in made)
    before_the_end = min(frames, 8 - first)
    segments = [(0, 2 * first, 2 * before_the_end)]
    if before_the_end < frames:
        segments.append((2 * before_the_end, 0, 2 * (frames - before_the_end)))
    indexed = tuple(part.clone() for part in made)
    turn.write(made, segments, key, value)
    turn.write(indexed, torch.cat([torch.arange(slot, slot + count) for _, slot, count in segments]), key, value)
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(indexed, made))
    exact, _ = plainly_turned(key, turn, norm)
    for kind, packed in enumerate((codec.pack(exact), codec.pack(value))):
        for part, fresh in zip(plain, packed):
            for source, slot, count in segments:
                part[kind, :, slot : slot + count] = fresh[:, source : source + count]
    assert alike(made[0], plain[0]) >= 0.97 or (storage, dtype) == ("model", torch.bfloat16)
    torch.testing.assert_close(made[-1].float(), plain[-1].float(), atol=1, rtol=0.13)
    for kind in (0, 1):
        there, stored = (tuple(part[kind, :, :11] for part in parts) for parts in (made, plain))
        read = turn.read(there, dtype)
        torch.testing.assert_close(read, codec.unpack(there), atol=0, rtol=torch.finfo(dtype).eps)
        assert storage != "float8" or torch.equal(read, codec.unpack(there))
        wide, expected = read.float(), codec.unpack(stored).float()
        step = {"model": torch.finfo(dtype).eps, "float8": 2**-3, "int8": 2 / 127}[storage]
        allowed = step * (expected.abs().amax(-1, keepdim=True) if storage == "int8" else expected.abs()) + 2**-9
        assert ((wide - expected).abs() <= allowed).all()


def alike(made, plain):
    return (made.float() == plain.float()).float().mean()


def test_float8_is_torchs_to_the_bit():
    """Every exponent, ties, what is too large, infinities and what is no number."""
    x = torch.cat([torch.arange(0, 2**16, 7).to(torch.int32) << 16, torch.arange(2**14) * 2**17 + 2**16]).to(
        torch.int32
    )
    x = torch.cat([x.view(torch.float32), torch.tensor([448.0, 464.0, 464.1, 480.0, torch.inf, -torch.inf, torch.nan])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 4096)).view(1, -1, 1, 4096)
    codec = CODECS["float8"](torch.bfloat16)
    (plain,) = codec.pack(x)
    made = torch.zeros_like(plain)
    kernels._put(x, None, (made,))
    number = ~x.isnan()
    assert torch.equal(made.view(torch.uint8)[number], plain.view(torch.uint8)[number])
    assert made.float()[~number].isnan().all()
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 1, 256)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(kernels.widened((codes,), dtype), codes.to(dtype), atol=0, rtol=0, equal_nan=True)


@few
@given(st.integers(1, 5), st.integers(1, 200), st.booleans(), dtypes, layouts, seeds)
def test_rows_in_float8(rows, width, gelu, dtype, layout, seed):
    x = (3 * some((1, rows, width), dtype, seed, layout))[0]
    made, plain = kernels.quantised(x, gelu), products.quantised(x, gelu)
    assert made.codes.is_contiguous() and made.codes.dtype == plain.codes.dtype and made.scales.shape == (rows, 1)
    # The plain path rounds a GELU before: a value may fall on the other side of the middle between two codes.
    torch.testing.assert_close(made.scales, plain.scales, rtol=torch.finfo(dtype).eps if gelu else 1e-6, atol=0)
    wide, expected = (one.codes.float() * one.scales for one in (made, plain))
    assert ((wide - expected).abs() <= expected.abs() / 8 + plain.scales * 2**-8).all()
    assert gelu or alike(made.codes, plain.codes) == 1


def test_int8_rounds_ties_to_even_and_keeps_zeros():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 3.2], [0.0] * 8]).view(1, 1, 2, 8).bfloat16()
    codes, scales = torch.ones(1, 1, 2, 8, dtype=torch.int8), torch.zeros(1, 1, 2, 1)
    kernels._put(x, None, (codes, scales))
    plain = CODECS["int8"](torch.bfloat16).pack(x)
    assert torch.equal(codes, plain[0])
    torch.testing.assert_close(scales, plain[1])


def broken_norm(*given):
    kernels_norm(*given)
    given[-1].mul_(1.5)


def unturned(heads, turn, parts):
    kernels_put(heads, None, parts)


def half_as_large(parts, dtype):
    return kernels_widened(parts, dtype) * (0.5 if parts[0].dtype == torch.int8 else 1)


kernels_norm, kernels_put, kernels_widened = kernels._launch_norm, kernels._put, kernels.widened


@pytest.mark.parametrize(
    ("name", "broken", "what"),
    [
        ("_launch_norm", broken_norm, "norms"),
        ("_put", unturned, "keys as model"),
        ("widened", half_as_large, "keys as int8"),
    ],
)
def test_kernels_that_give_other_numbers_are_noticed_before_they_are_used(monkeypatch, name, broken, what):
    kernels.check("cpu")
    monkeypatch.setattr(kernels, name, broken)
    with pytest.raises(RuntimeError, match=f"its {what} are off by"):
        kernels.check("cpu")


@pytest.mark.parametrize(
    "rules", [{}, {"positions": "window"}, {"window": 4, "positions": "window", "leaving": "memory"}]
)
def test_one_video_whose_values_are_not_copied(monkeypatch, rules):
    """Also where kept frames move or are averaged first."""
    on_a_gpu(monkeypatch)
    cache = CacheConfig(**{"window": 3, "sink": 1} | rules)
    asked, rows_of = [], RollingKVCache.value_rows
    monkeypatch.setattr(RollingKVCache, "value_rows", lambda *at: asked.append(rows_of(*at)) or asked[-1])
    exact, plain = (video(dtype, cache, ExecutionConfig(plain=True), 1, 6) for dtype in (torch.float32, torch.float16))
    assert not asked
    made = video(torch.float16, cache, None, 1, 6)
    assert any(rows is not None for rows in asked) and (None in asked) == bool(rules)
    assert (made - exact).norm() <= 1.3 * (plain - exact).norm()


@pytest.mark.parametrize(("batch", "offloaded"), [(1, False), (2, False), (1, True)])
def test_blocks_with_a_timestep_for_each_frame(monkeypatch, batch, offloaded):
    """One after the other: the first has made the second's norm, unless the second's weights are elsewhere by then."""
    on_a_gpu(monkeypatch)
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12, cross_attn_norm=True).half()
    x, prompt, temb = (
        some((batch, *size), torch.float16, seed) for seed, size in enumerate([(12, 24), (5, 24), (3, 6, 24)])
    )
    given = prompt, temb, transformer.rope(torch.zeros(batch, 16, 3, 4, 4))
    if offloaded:
        offload_blocks(transformer, "cpu")
    launched, launches, launch = [], [], kernels._launch_norm
    monkeypatch.setattr(kernels, "_launch_norm", lambda *rest: launched.append(1) or launch(*rest))

    def through(kernels):
        made = x
        with torch.no_grad():
            forwards = dict(fused.fused_forwards(transformer.blocks, kernels))
            for block in transformer.blocks:
                made = forwards[block](made, *given)
                launches.append(len(launched))
        return made

    plain, made = through(None), through(kernels)
    assert launches == ([0, 0, 3, 6] if offloaded else [0, 0, 4, 6])
    torch.testing.assert_close(made, plain, atol=2e-2, rtol=1e-2)


def on_a_gpu(monkeypatch):
    monkeypatch.setattr(fused, "fuses_half", lambda x: x.dtype == torch.float16)
    monkeypatch.setattr(processors, "fuses_half", fused.fuses_half)
    monkeypatch.setattr(attachment, "fuses_half", fused.fuses_half)
    monkeypatch.setattr(fused, "kernels_run_on", lambda device: True)


def test_a_video_is_as_near_to_float32_as_without_kernels(monkeypatch):
    """Steps, context passes and a window that wraps; a batch of two."""
    on_a_gpu(monkeypatch)
    launched = []
    put = kernels._put
    monkeypatch.setattr(kernels, "_put", lambda *given: launched.append(1) or put(*given))
    exact = video(torch.float32, CacheConfig(3, sink=1))
    cache = CacheConfig(3, sink=1, storage="int8")
    assert not launched
    plain = video(torch.float16, cache, ExecutionConfig(plain=True))
    assert not launched
    made = video(torch.float16, cache)
    # Of each of 2 layers: a query, a key and a value in each of 4 chunks' 2 steps and in 3 context passes, all but the last.
    assert len(launched) >= 2 * 3 * 8
    assert (made - exact).norm() <= 1.3 * (plain - exact).norm()


def video(dtype, cache, execution=None, batch=2, chunks=4):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12, cross_attn_norm=True).to(dtype)
    model = CausalModel(transformer, ModelPreset("test", SamplingConfig(chunk=1, denoising_steps=(1000, 500)), cache))
    prompt = torch.randn(1, 6, transformer.config.text_dim, generator=torch.Generator().manual_seed(0))
    with RollingSession(model, prompt, height=16, width=32, batch=batch, execution=execution) as session:
        for _ in session.generate(chunks, seed=[7, 8][:batch]):
            pass
    return session.state.latents().float()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))


# ---- the VAE's ----------------------------------------------------------------------------------------------------------


@few
@given(counts, st.integers(1, 70), st.integers(0, 3), st.integers(1, 20), dtypes, st.booleans(), seeds)
def test_norms_with_their_activation(batch, channels, frames, width, dtype, last, seed):
    x = some((batch, channels, frames, 3, width), torch.float32, seed).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    weight = some((channels, 1, 1, 1), dtype, seed + 1)
    made = vae_kernels.activated_norm(x, weight, 1e-24)
    normed = rms_norm(x.float().movedim(1, -1), (channels,), weight.float().flatten(), eps=1e-24)
    assert_rounded_alike(made.movedim(1, -1), silu(normed).to(dtype))


def test_norms_of_nothing_are_nothing():
    zeros = torch.zeros(1, 24, 1, 2, 2, dtype=torch.float16)
    assert torch.equal(vae_kernels.activated_norm(zeros, torch.ones(24, 1, 1, 1).half(), 1e-24), zeros)


def test_norms_that_give_other_numbers_are_noticed_before_they_are_used(monkeypatch):
    vae_kernels.check("cpu")
    monkeypatch.setattr(vae_kernels, "activated_norm", lambda x, *_: x)
    with pytest.raises(RuntimeError, match="its activated norms are off by"):
        vae_kernels.check("cpu")


@pytest.mark.parametrize("make", [make_vae, make_vae_22], ids=["2.1", "2.2"])
def test_a_vae_decodes_and_encodes_with_them_as_near_to_float32_as_without(make, monkeypatch):
    vae = make()
    raw, given = latents(3, channels=vae.config.z_dim), pixels(5, 32, 64)

    def both(vae):
        return [WanVAE(vae).decoder().decode(raw), WanVAE(vae).encoder().encode(given)]

    exact, half = both(vae), copy.deepcopy(vae).to(torch.float16)
    streamline(half)
    plain, launched = both(half), []
    put = vae_kernels.activated_norm
    monkeypatch.setattr(vae_kernels, "activated_norm", lambda *given: launched.append(1) or put(*given))
    monkeypatch.setattr(vae_wan, "checked_kernels", lambda load, device: load())
    made = both(half)
    activations = [
        sum(isinstance(each, torch.nn.SiLU) for each in part.modules()) for part in (vae.decoder, vae.encoder)
    ]
    # Two in each block, one at the end; three latent frames are decoded, and two groups of frames encoded.
    assert len(launched) == sum(times * (2 * count - 1) for times, count in zip((3, 2), activations))
    for one, other, sharp in zip(made, plain, exact):
        assert (one - sharp).norm() <= 1.1 * (other - sharp).norm()
