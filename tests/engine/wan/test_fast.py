"""Fast passes: what they use where, products in float8, and what is said of what is missing."""

import pytest
import torch
from builders import tiny_transformer
from diffusers import WanTransformer3DModel

from rolling_kv.checkpoints.float8 import store_float8
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.float8_linear import FLOAT8, Float8Linear
from rolling_kv.platforms import Platform
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.session import RollingSession
from rolling_kv.wan import fast, products
from rolling_kv.wan.attachment import apply_rolling_kv_cache
from rolling_kv.wan.float8_attention import FLASH_3_FLOAT8
from rolling_kv.wan.products import Product, Quantiser

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SAMPLING, CACHE = SamplingConfig(chunk=2, denoising_steps=(1000, 500)), CacheConfig(5, sink=1)
SIZE = {"height": 32, "width": 48}
FAST = ExecutionConfig(fast=True)


def some(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(wide=64, out=48, bias=True, dtype=torch.bfloat16):
    made = torch.nn.Linear(wide, out, bias, dtype=dtype)
    for seed, parameter in enumerate(made.parameters()):
        parameter.data = some(*parameter.shape, seed=seed, dtype=dtype)
    return made


def transformer(dtype=torch.bfloat16, **size):
    return tiny_transformer(**{"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 96} | size).to(dtype)


@pytest.fixture
def with_products(monkeypatch):
    """A CPU multiplies in float8 too, slowly."""
    monkeypatch.setattr(fast, "fast_on", lambda *where: fast.Fast(where[3], True, ""))


def rounded(x):
    rows = products.quantised(x.flatten(0, -2))
    return rows.codes.float() * rows.scales


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_rows_rounded_to_float8(dtype, bias):
    layer, x = linear(bias=bias, dtype=dtype), some(2, 5, 64, seed=7, dtype=dtype)
    with torch.no_grad():
        made = Product(layer, Quantiser())(x)
        plain = rounded(x) @ rounded(layer.weight).T + (layer.bias.float() if bias else 0)
    assert made.dtype == dtype and made.shape == (2, 5, 48)
    torch.testing.assert_close(made.flatten(0, 1).float(), plain, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
    error = (made.float() - torch.nn.functional.linear(x, layer.weight, layer.bias).float()).norm() / plain.norm()
    assert 0.01 < error < 0.05


def test_a_row_keeps_its_own_scale():
    """A token a thousand times as large takes nothing from the others."""
    x = some(3, 64)
    large = x.clone()
    large[1] *= 1024
    one, other = products.quantised(x), products.quantised(large)
    assert torch.equal(one.codes.float(), other.codes.float())
    assert torch.equal(one.scales * torch.tensor([[1.0], [1024.0], [1.0]]), other.scales)
    zeros = products.quantised(torch.zeros(2, 16))
    assert zeros.codes.float().eq(0).all() and zeros.scales.isfinite().all()


@pytest.mark.parametrize("scale", [None, torch.full((1, 1), 0.5), torch.rand(48, 1)])
def test_a_weight_that_is_in_float8_is_multiplied_as_it_lies(scale):
    kept, x = Float8Linear.of(linear(), scale), some(5, 64, seed=7)
    made = Product(kept, Quantiser())
    assert made.weight.data_ptr() == kept.weight.data_ptr()
    with torch.no_grad():
        plain = rounded(x) @ kept.widened(torch.float32).T + kept.bias.float()
        torch.testing.assert_close(made(x).float(), plain, rtol=2**-7, atol=1e-2)


def test_what_several_layers_are_given_is_quantised_once(monkeypatch):
    calls = []
    plain = products.quantised
    monkeypatch.setattr(products, "quantised", lambda x, gelu=False: calls.append(x) or plain(x, gelu))
    quantiser, x = Quantiser(), some(5, 64)
    first, second = (Product(linear(), quantiser) for _ in range(2))
    calls.clear()
    assert torch.equal(first(x), second(x)) and len(calls) == 1
    first(x.clone())
    assert len(calls) == 2


def test_layers_that_multiply_in_float8():
    made = transformer()
    block = made.blocks[0]
    names = {id(layer): name for name, layer in block.named_modules()}
    expected = "attn1.to_q attn1.to_k attn1.to_v attn2.to_q attn1.to_out.0 attn2.to_out.0 ffn.net.0.proj ffn.net.2"
    assert [names[id(layer)] for layer in products.layers_of(block)] == expected.split()
    hook = block.attn1.to_q.register_forward_hook(lambda *_: None)
    assert block.attn1.to_q not in products.layers_of(block)
    hook.remove()
    assert not products.layers_of(transformer(attention_head_dim=12).blocks[0])[:6]  # 24 is no multiple of 16
    values = sum(layer.weight.numel() + 4 * layer.out_features for layer in products.layers_of(block))
    assert products.bytes_of(made) == values * len(made.blocks)
    store_float8(made)
    assert products.bytes_of(made) == sum(4 * layer.out_features for layer in products.layers_of(block)) * len(
        made.blocks
    )


def video(model, execution=None, chunks=5):
    prompt = some(1, 6, model.transformer.config.text_dim, dtype=torch.float32)
    with RollingSession(model, prompt, execution=execution, **SIZE) as session:
        for _ in session.generate(chunks, seed=7):
            pass
    return session.state.latents().float()


@pytest.mark.parametrize("compile", [False, True], ids=["", "compiled"])
@pytest.mark.usefixtures("with_products")
def test_a_fast_video_is_near_the_standard_one(compile):
    torch._dynamo.reset()
    model = CausalModel(transformer(), ModelPreset("test", SAMPLING, CACHE))
    calls = []
    scaled = torch._scaled_mm
    with pytest.MonkeyPatch.context() as patch:
        if not compile:
            patch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: calls.append(1) or scaled(*args, **kwargs))
        made = video(model, ExecutionConfig(fast=True, compile=compile), 2 if compile else 5)
    # 2 layers: in each of 5 chunks 2 steps, and 4 context passes, whose last block ends with its keys and values.
    assert compile or len(calls) == 2 * 8 * 10 + 4 * (8 + 2)
    plain = video(model, chunks=2 if compile else 5)
    error = (made - plain).norm() / plain.norm()
    assert 1e-4 < error < 0.1
    assert not any("forward" in vars(module) for module in model.transformer.modules())
    assert torch.equal(video(model, chunks=2 if compile else 5), plain)


@pytest.mark.usefixtures("with_products")
def test_gelu_is_computed_as_it_is_quantised():
    made = transformer()
    ffn, x = made.blocks[0].ffn, some(1, 24, 32)
    with torch.no_grad():
        plain = ffn(x)
        with apply_rolling_kv_cache(made, FAST):
            error = (ffn(x) - plain).norm() / plain.norm()
            assert ffn.forward.__qualname__.startswith("_feed_forward")
    assert 0 < error < 0.06


def test_on_a_cpu_nothing_is_fast_and_that_is_said_once(caplog):
    fast.say_once.cache_clear()
    model = CausalModel(transformer(), ModelPreset("test", SAMPLING, CACHE))
    assert torch.equal(video(model, FAST, 2), video(model, chunks=2)) and video(model, FAST, 1) is not None
    (said,) = [record.message for record in caplog.records if "Fast passes" in record.message]
    assert said == (
        "Fast passes use PyTorch's attention (attention in 8 bits needs a CUDA GPU) and products in bfloat16 (float8 ones "
        "need an NVIDIA GPU from RTX 40 or H100 on)."
    )


@pytest.fixture
def card(monkeypatch):
    """A stand-in for a card: its capability, what is installed, and what is wrong with it."""

    def put(capability, installed=(), error=0.02, broken=False, float8=False):
        """float8: whether FlashAttention 3 is built with float8."""
        fast.fast_on.cache_clear()
        monkeypatch.setattr(fast, "platform_of", lambda device: Platform("cuda", capability))

        def error_of(backend, *_):
            if backend == FLASH_3_FLOAT8 and not float8:
                raise RuntimeError("This flash attention build does not support FP8.")
            return error

        monkeypatch.setattr(fast, "_error_of", error_of)

        def check(self, device=None, **_):
            if self.backend not in (None, *installed):
                raise ValueError("not installed")

        def multiply(device):
            if broken:
                raise RuntimeError("no such kernel\nand more")

        monkeypatch.setattr(ExecutionConfig, "check", check)
        monkeypatch.setattr(products, "check", multiply)
        return fast.fast_on(CUDA, torch.bfloat16, 128)

    yield put
    fast.fast_on.cache_clear()


def test_what_a_card_uses(card):
    assert card((9, 0), ("sage", "_flash_3")) == ("sage", True, "")
    assert card((8, 0), ("sage",)) == (
        "sage", False, "Fast passes use products in bfloat16 (float8 ones need an NVIDIA GPU from RTX 40 or H100 on).",
    )  # fmt: skip
    backend, multiplies, remark = card((9, 0), ("_flash_3",))
    assert (backend, multiplies) == ("_flash_3", True)
    assert remark == "Fast passes use FlashAttention 3, in 16 bits (SageAttention is not installed)."
    assert card((9, 0))[0] is None and "PyTorch's attention (SageAttention is not installed)" in card((9, 0)).remark
    assert card((8, 9), ("sage",), error=0.4).backend is None
    assert "SageAttention is off by 0.4 here" in card((8, 9), ("sage",), error=0.4).remark
    assert "(float8 ones cannot be had here: no such kernel)" in card((8, 9), ("sage",), broken=True).remark
    assert fast.fast_on(CUDA, torch.float16, 128).remark.endswith("products in float16 (float8 ones give bfloat16).")
    assert fast.fast_on(CUDA, torch.bfloat16, 128, "native").backend == "native"
    assert "with Triton or torch.compile only" in fast.fast_on(CUDA, torch.bfloat16, 128, fused=False).remark


def test_which_attention_a_card_uses(card):
    every = "sage", "_flash_3"
    assert card((9, 0), every, float8=True) == ("sage", True, "")
    assert card((9, 0), ("_flash_3",), float8=True) == (FLASH_3_FLOAT8, True, "")
    assert card((9, 0), every, error=0.4, float8=True).backend is None
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):  # where FlashAttention 3 would end the process
        assert card(other, ("_flash_3",), float8=True).backend is None


@pytest.mark.parametrize(
    ("execution", "triton", "fused"),
    [({}, True, True), ({}, False, False), ({"plain": True}, True, False), ({"compile": True}, False, True)],
)
def test_products_are_quantised_in_one_kernel_or_not_at_all(monkeypatch, execution, triton, fused):
    asked = []
    monkeypatch.setattr(fast, "kernels_run_on", lambda device: triton)
    monkeypatch.setattr(fast, "fast_on", lambda *where: asked.append(where[-1]) or fast.Fast(None, True, ""))
    fast.fast_for(ExecutionConfig(fast=True, **execution), transformer(), CUDA)
    assert asked == [fused]


def test_products_that_give_other_numbers_are_noticed(monkeypatch):
    products.check("cpu")
    scaled = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: 1.2 * scaled(*args, **kwargs))
    with pytest.raises(RuntimeError, match="off by 0.2"):
        products.check("cpu")


def test_attention_that_is_tried_is_compared(monkeypatch):
    assert fast._error_of("native", CPU, torch.bfloat16, 64) < 0.01
    attend = fast.dispatch_attention_fn
    monkeypatch.setattr(fast, "dispatch_attention_fn", lambda *args, **kwargs: 0.5 * attend(*args, **kwargs))
    assert fast._error_of("native", CPU, torch.bfloat16, 64) > fast.OFF


def test_exact_and_fast_exclude_each_other():
    with pytest.raises(ValueError, match="exact or fast, not both"):
        ExecutionConfig(exact=True, fast=True).check()


@pytest.mark.usefixtures("with_products")
def test_bytes_of_the_products_are_announced():
    made = transformer()
    assert fast.product_bytes(ExecutionConfig(), made, CPU) == 0
    beside = fast.product_bytes(FAST, made, CPU)
    run = estimate(made, **SIZE, sampling=SAMPLING, cache=CACHE, products=beside, weight_sets=2)
    plain = estimate(made, **SIZE, sampling=SAMPLING, cache=CACHE, weight_sets=2)
    assert run.device - plain.device == 2 * beside == 2 * products.bytes_of(made) > 0


@pytest.mark.parametrize(("heads", "ffn"), [(12, 8960), (40, 13824)])
def test_products_of_the_true_sizes_have_what_torch_asks_for(heads, ffn):
    """On the meta device torch checks sizes, strides and dtypes as on CUDA."""
    with torch.device("meta"):
        made = WanTransformer3DModel(num_layers=1, num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn)
    block = made.bfloat16().blocks[0]
    quantiser = Quantiser()
    for layer in products.layers_of(block):
        product = Product(layer, quantiser)
        x = torch.empty(1, 4680, layer.in_features, dtype=torch.bfloat16, device="meta")
        out = product(x)
        assert out.shape == (1, 4680, layer.out_features) and out.dtype == torch.bfloat16 and out.is_contiguous()
        assert product.weight.dtype == FLOAT8 and product.weight.stride(0) == 1
        assert product.scales.shape == (1, layer.out_features) and product.scales.is_contiguous()
