"""A pass with a timestep for each frame, against stock diffusers' own of one for each token."""

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.cache.prompt import Branch, PromptCache
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.config import CacheConfig, ExecutionConfig
from rolling_kv.wan import attachment
from rolling_kv.wan.attachment import apply_rolling_kv_cache
from rolling_kv.wan.framewise import framewise_forward

TIMES = (1000.0, 833.3333, 0.0)
TOKENS = 4 * 6  # of a frame


@pytest.fixture
def transformer():
    return tiny_transformer(num_attention_heads=2, attention_head_dim=24)


def given(transformer, batch, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 16, 3, 8, 12, generator=generator).to(dtype)
    return latents, torch.randn(batch, 8, transformer.config.text_dim, generator=generator).to(dtype)


def one_pass(transformer, timestep, batch=1, dtype=torch.float32, keys_only=False, **execution):
    """The flow, and the layers' keys and values."""
    latents, prompt = given(transformer, batch, dtype)
    shape = CacheShape.of(transformer, batch, 8, 12, dtype)
    part = Branch(RollingKVCache(shape, CacheConfig(6), "cpu"), PromptCache(prompt))
    with torch.inference_mode(), apply_rolling_kv_cache(transformer, ExecutionConfig(**execution)) as attached:
        part.cache.begin(3)
        flow = attached.forward(latents, timestep, part, keys_only=keys_only)
    return flow, part.cache.store.layers


def per_token(transformer, batch, dtype=torch.float32):
    latents, prompt = given(transformer, batch, dtype)
    times = torch.tensor([TIMES]).repeat_interleave(TOKENS, dim=1).expand(batch, -1)
    with torch.inference_mode():
        return transformer(latents, times, prompt, return_dict=False)[0]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("batch", [1, 2])
def test_each_frame_has_its_own_as_in_stock_diffusers(transformer, batch, exact):
    flow, _ = one_pass(transformer, TIMES, batch, exact=exact)
    torch.testing.assert_close(flow, per_token(transformer, batch), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(flow, one_pass(transformer, TIMES[::-1], batch, exact=exact)[0], atol=1e-2)


def test_half_precision_differs_from_stock_diffusers_by_its_rounding(transformer):
    expected = per_token(transformer, 1)
    transformer.to(torch.bfloat16)
    stock, (flow, _) = per_token(transformer, 1, torch.bfloat16), one_pass(transformer, TIMES, dtype=torch.bfloat16)
    assert flow.dtype == torch.bfloat16
    assert (flow - expected).abs().mean() <= 1.5 * (stock - expected).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_ones_are_a_single_one_bit_for_bit(transformer, batch, dtype):
    transformer.to(dtype)
    single, expected = one_pass(transformer, 625.0, batch, dtype, exact=True)
    flow, layers = one_pass(transformer, (625.0,) * 3, batch, dtype, exact=True)
    assert torch.equal(flow, single)
    assert all(torch.equal(ours, theirs) for (ours,), (theirs,) in zip(layers, expected))


def test_equal_ones_are_a_single_one_to_rounding_in_fused_blocks(transformer):
    flow, _ = one_pass(transformer, (625.0,) * 3)
    torch.testing.assert_close(flow, one_pass(transformer, 625.0)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_the_keys_only_pass_writes_what_a_full_pass_writes(transformer, exact):
    flow, cut = one_pass(transformer, TIMES, keys_only=True, exact=exact)
    _, full = one_pass(transformer, TIMES, exact=exact)
    assert flow is None
    assert all(torch.equal(ours, theirs) and ours.abs().sum() > 0 for (ours,), (theirs,) in zip(cut, full))


def test_somebody_elses_block_is_run_as_stock_diffusers_runs_it(transformer):
    """With a row of modulation for each token; a full last block in the keys-only pass too."""
    expected, _ = one_pass(transformer, TIMES)
    seen = []

    def around(forward):
        return lambda *args: seen.append(args[2].shape) or forward(*args)

    for block in transformer.blocks:
        block.forward = around(block.forward)
    flow, _ = one_pass(transformer, TIMES)
    torch.testing.assert_close(flow, expected, atol=2e-5, rtol=1e-4)
    one_pass(transformer, TIMES, keys_only=True)
    assert seen == [(1, 3 * TOKENS, 6, 48)] * 4
    one_pass(transformer, 625.0)
    assert seen[4:] == [(1, 6, 48)] * 2


def test_a_block_keeps_its_modulation_small(transformer):
    """One row a frame: nothing as large as the tokens of the six tensors that stock diffusers makes."""
    block, shapes = transformer.blocks[0], []

    def note(forward):
        return lambda h, e, temb, r: shapes.append(temb.shape) or forward(h, e, temb, r)

    inner = framewise_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attachment, "framewise_forward", lambda *args: note(inner(*args)))
        one_pass(transformer, TIMES, batch=2)
    assert shapes == [(2, 3, 6, 48)] * len(transformer.blocks)
    assert "forward" not in vars(block)


def test_as_many_as_frames_or_one(transformer):
    with pytest.raises(ValueError, match="a chunk of 3 frames takes 1 timestep or 3, got 2"):
        one_pass(transformer, TIMES[:2])


def test_passes_of_both_kinds_have_recordings_of_their_own(transformer, monkeypatch):
    """A recording is of one shape of sinusoid; the timesteps themselves come in through it."""
    keys = []

    class Graphs:
        def __init__(self, record, addresses):
            pass

        def run(self, key, prompt, forward, *inputs):
            keys.append((key, inputs[3].shape))
            return forward(*inputs)

        def clear(self):
            pass

    monkeypatch.setattr(attachment, "PassGraphs", Graphs)
    monkeypatch.setattr(attachment, "CudaRecorder", lambda device: None)
    monkeypatch.setattr(ExecutionConfig, "_check_cuda_graphs", lambda *_: None)
    latents, prompt = given(transformer, 1)
    shape = CacheShape.of(transformer, 1, 8, 12, torch.float32)
    part = Branch(RollingKVCache(shape, CacheConfig(3), "cpu"), PromptCache(prompt))
    with torch.inference_mode(), apply_rolling_kv_cache(transformer, ExecutionConfig(cuda_graphs=True)) as attached:
        part.cache.begin(3)
        for timestep in (625.0, TIMES, TIMES[::-1]):
            attached.forward(latents, timestep, part)
    (single, flat), (framewise, rows), (again, _) = keys
    assert single != framewise == again
    assert (flat, rows) == ((32,), (3, 32))
