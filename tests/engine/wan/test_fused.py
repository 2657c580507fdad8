"""The fused block against the stock one."""

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.wan import fused
from rolling_kv.wan.fused import fused_feed_forward, fused_forward, gelu_, modulated_norm, rms_norm_


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_gives_what_the_stock_block_gives(batch, dtype):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24).to(dtype)
    block = transformer.blocks[0]
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(batch, 12, 48, generator=generator).to(dtype)
    prompt = torch.randn(batch, 5, 48, generator=generator).to(dtype)
    temb = torch.randn(batch, 6, 48, generator=generator).to(dtype)
    rotary = transformer.rope(torch.zeros(batch, 16, 3, 4, 4))
    before = hidden_states.clone()
    with torch.no_grad():
        expected = block(hidden_states, prompt, temb, rotary)
        actual = fused_forward(block, block.forward)(hidden_states, prompt, temb, rotary)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(hidden_states, before)  # hooks on a block compare its input with its output


def test_the_fused_feed_forward_makes_way_for_what_stands_between_the_layers(monkeypatch):
    monkeypatch.setattr(fused, "AVX2", False)
    ffn = tiny_transformer(num_attention_heads=2, attention_head_dim=24).blocks[0].ffn
    forward = fused_feed_forward(ffn, ffn.forward)
    x = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(0))
    fused_calls, hook_calls = [], []
    linear, proj = torch.nn.functional.linear, ffn.net[0].proj

    def product(x, weight, bias, name, scalars, algorithm):
        fused_calls.append((name, algorithm))
        return torch.nn.functional.gelu(linear(x, weight, bias), approximate=algorithm)

    with torch.no_grad():
        expected = ffn(x)
        torch.testing.assert_close(forward(x), expected, atol=2e-6, rtol=1e-5)  # oneDNN's own, where it is
        monkeypatch.setattr(fused, "ONEDNN_LINEAR", product)
        torch.testing.assert_close(forward(x), expected, atol=2e-6, rtol=1e-5)
        assert fused_calls == [("gelu", "tanh")]
        for module in (ffn.net[0], proj):
            handle = module.register_forward_hook(lambda *_: hook_calls.append(1))
            assert torch.equal(forward(x), expected)
            handle.remove()
        proj.forward = lambda x: hook_calls.append(1) or linear(x, proj.weight, proj.bias)
        assert torch.equal(forward(x), expected)
        del proj.forward
    forward(x)  # with gradients, which the fused product does not have
    assert len(fused_calls) == 1 and len(hook_calls) == 3


def test_with_vectors_of_avx2_the_gelu_follows_the_product(monkeypatch):
    ffn = tiny_transformer(num_attention_heads=2, attention_head_dim=24).blocks[0].ffn
    x = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(0))
    asked = []

    def product(x, weight, bias, name, scalars, algorithm):
        asked.append((name, algorithm))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(fused, "AVX2", True)
    monkeypatch.setattr(fused, "ONEDNN_LINEAR", product)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(fused_feed_forward(ffn, None)(x), ffn(x), atol=2e-6, rtol=1e-5)
    assert asked == [("none", "")] and torch.equal(x, before)


@pytest.mark.parametrize("piece", [fused.PIECE, 64, 100])
def test_gelu_in_place_is_as_close_as_torchs(monkeypatch, piece):
    monkeypatch.setattr(fused, "PIECE", piece)
    x = torch.linspace(-15, 15, 3 * 2048).view(1, 3, -1)
    exact, torchs = (torch.nn.functional.gelu(wide, approximate="tanh") for wide in (x.double(), x))
    with torch.no_grad():
        made = gelu_(copied := x.clone())
        assert torch.equal(
            gelu_(torch.tensor([-1e30, 0.0, 1e30, torch.inf])), torch.tensor([0.0, 0.0, 1e30, torch.inf])
        )
        assert gelu_(torch.tensor([torch.nan])).isnan().all()
    assert made.data_ptr() == copied.data_ptr() and made.shape == x.shape
    assert (made - exact).abs().max() <= 2 * (torchs - exact).abs().max()


def test_norms():
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    norm = torch.nn.RMSNorm(48, eps=1e-6)
    norm.weight.data.uniform_(0.5, 2)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm_(x.clone(), norm), norm(x), atol=2e-6, rtol=1e-5)
        assert torch.isfinite(rms_norm_(torch.zeros(1, 1, 48), norm)).all()
        plain = torch.nn.LayerNorm(48, elementwise_affine=False)
        for rows in (x[:1], x):
            scale, shift = torch.randn(2, len(rows), 1, 48, generator=torch.Generator().manual_seed(2))
            torch.testing.assert_close(modulated_norm(rows, plain, scale, shift), plain(rows) * (1 + scale) + shift)
