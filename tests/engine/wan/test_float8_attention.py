"""Attention in float8 by FlashAttention 3: what the library is given, and what comes of it. Its kernel is imitated."""

import sys
from types import SimpleNamespace

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.bench.speeds import imitation
from rolling_kv.cache.joint import JointKVCache, JointPass
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.float8_linear import FLOAT8
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.wan import fast, processors
from rolling_kv.wan.float8_attention import FLASH_3_FLOAT8, attention, beside, quantised

CPU = torch.device("cpu")
SAMPLING = SamplingConfig(chunk=2, denoising_steps=(1000, 500))


def some(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def library(monkeypatch):
    """FlashAttention 3 with the signature of its `flash_attn_func`, and what its C++ refuses. Gives what it is called with."""
    calls = []

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert {q.dtype, k.dtype, v.dtype} == {FLOAT8} and k.shape == v.shape
        for heads in (q, k, v):  # rows of which each begins at a multiple of 16 bytes, as they are copied
            assert heads.stride(-1) == 1 and heads.shape[-1] % 16 == 0
            assert all(stride % 16 == 0 for stride in (*heads.stride()[:-1], heads.storage_offset()))
        for scale in (q_descale, k_descale, v_descale):
            assert scale is None or (scale.dtype == torch.float32 and scale.shape == (len(q), k.shape[2]))
        assert softmax_scale is None and not causal and window_size == (-1, -1) and qv is None
        calls.append((q, k, v, q_descale, k_descale, v_descale))
        return imitation.flash_attn_func(q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)

    installed = SimpleNamespace(flash_attn_func=flash_attn_func, calls=calls)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", installed)
    return installed


def plain_attention(query, key, value):
    wide = (heads.float().transpose(1, 2) for heads in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_have_a_scale_each(dtype):
    heads = some(2, 40, 3, 16, dtype=dtype)
    heads[0, :, 1] *= 100
    heads[1, :, 2] = 0
    codes, scales = quantised(heads)
    assert codes.dtype == FLOAT8 and codes.shape == heads.shape and codes.is_contiguous()
    assert scales.shape == (2, 3) and scales.dtype == torch.float32
    largest = codes.float().abs().amax((1, 3))
    assert torch.equal(largest, torch.tensor([[448.0, 448, 448], [448, 448, 0]]))
    torch.testing.assert_close(codes.float() * scales[:, None, :, None], heads.float(), rtol=2**-4, atol=1e-3)
    # What is not contiguous, as a part of what several heads share, is quantised alike.
    apart = torch.cat([heads, heads], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, :40]
    assert torch.equal(quantised(apart)[0].float(), codes.float())


def test_what_is_in_float8_stays_where_it_is():
    kept = some(1, 8, 2, 16).to(FLOAT8)
    codes, scales = quantised(kept)
    assert codes is kept and scales is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_that_of_the_model_to_its_rounding(library, dtype):
    query, key, value = (
        some(2, 50, 3, 16, dtype=dtype),
        some(2, 70, 3, 16, seed=1, dtype=dtype),
        some(2, 70, 3, 16, seed=2),
    )
    value = (value * torch.tensor([1, 50, 0.01])[:, None]).to(dtype)
    made, plain = attention(query, key, value), plain_attention(query, key, value)
    assert made.dtype == dtype and made.shape == query.shape
    errors = (made - plain).float().norm(dim=(1, 3)) / plain.norm(dim=(1, 3))
    assert ((errors > 0.01) & (errors < 0.07)).all(), errors
    *_, q_scale, k_scale, v_scale = library.calls[-1]
    assert q_scale is not None and k_scale is not None and v_scale is not None
    kept = attention(query, key.to(FLOAT8), value.to(FLOAT8))
    assert (kept - plain).norm() < 0.07 * plain.norm() and library.calls[-1][4:] == (None, None)


def test_versions_that_return_the_sums_of_the_weights_too(library, monkeypatch):
    heads = some(1, 20, 2, 16)
    expected, attend = attention(heads, heads, heads), library.flash_attn_func
    monkeypatch.setattr(library, "flash_attn_func", lambda *args, **kwargs: (attend(*args, **kwargs), None))
    assert torch.equal(attention(heads, heads, heads), expected)


def test_it_is_tried_as_it_is_used(library, monkeypatch):
    assert 0.01 < fast._error_of(FLASH_3_FLOAT8, CPU, torch.bfloat16, 128) < fast.OFF and library.calls
    attend = library.flash_attn_func
    monkeypatch.setattr(library, "flash_attn_func", lambda *args, **kwargs: 0.5 * attend(*args, **kwargs))
    assert fast._error_of(FLASH_3_FLOAT8, CPU, torch.bfloat16, 128) > fast.OFF


def video(storage, execution=None):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=16, ffn_dim=96).to(torch.bfloat16)
    model = CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(5, sink=1, storage=storage)))
    prompt = some(1, 6, transformer.config.text_dim, dtype=torch.float32)
    with RollingSession(model, prompt, execution=execution, height=32, width=48) as session:
        for _ in session.generate(5, seed=7):
            pass
    return session.state.latents().float()


@pytest.mark.parametrize("storage", ["model", "float8", "int8"])
def test_a_video_is_near_the_standard_one(library, monkeypatch, storage):
    beside_it = []
    dispatch = processors.dispatch_attention_fn

    def attend(*heads, backend=None, **given):
        beside_it.append(backend)
        return dispatch(*heads, backend=None, **given)

    monkeypatch.setattr(processors, "dispatch_attention_fn", attend)
    plain = video(storage)
    assert not library.calls and set(beside_it) == {None}
    beside_it.clear()
    monkeypatch.setattr(fast, "fast_on", lambda *where: fast.Fast(FLASH_3_FLOAT8, False, ""))
    made = video(storage, ExecutionConfig(fast=True))
    error = (made - plain).norm() / plain.norm()
    assert 1e-4 < error < 0.05
    # 2 layers: in each of 5 chunks 2 steps, and 4 context passes, whose last block attends to nothing.
    assert len(library.calls) == len(beside_it) == 2 * 10 + 4
    assert set(beside_it) == {"_flash_3"} and beside("sage") == "sage" and beside(None) is None
    for _, key, value, _, k_scale, v_scale in library.calls:
        in_the_cache = key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        assert in_the_cache == (storage == "float8") == (k_scale is None) == (v_scale is None)


@pytest.mark.parametrize("storage", ["model", "float8", "int8"])
def test_a_cache_gives_float8_as_it_is_kept(storage):
    shape = CacheShape(layers=1, batch=1, tokens_per_frame=2, heads=2, head_dim=16, dtype=torch.bfloat16)
    config = CacheConfig(4, sink=1, storage=storage)
    for made in (RollingKVCache(shape, config, "cpu"), JointKVCache(shape, config, "cpu")):
        heads = some(1, 4, 2, 16)
        made.begin(2)
        plain = made.update(0, heads, heads)
        as_kept = made.update(0, heads, heads, as_kept=True)
        for one, other in zip(plain, as_kept):
            assert one.dtype == torch.bfloat16 and other.dtype == (FLOAT8 if storage == "float8" else torch.bfloat16)
            assert torch.equal(one.float(), other.float())
        made.commit()
    keys, values = JointPass(made, 1).update(0, heads[:, :2], heads[:, :2], as_kept=True)
    assert keys.dtype == values.dtype == torch.bfloat16
