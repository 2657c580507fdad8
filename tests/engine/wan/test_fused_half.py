"""The block in half precision: what the stock block gives, in fewer kernels and bytes. Counted on the meta device."""

import importlib
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from builders import tiny_transformer
from counted import Counted
from diffusers import WanTransformer3DModel

from rolling_kv.cache.prompt import Branch, PromptCache
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.config import CacheConfig, ExecutionConfig
from rolling_kv.wan import attachment, fast, fused, processors
from rolling_kv.wan.attachment import apply_rolling_kv_cache
from rolling_kv.wan.float8_attention import FLASH_3_FLOAT8
from rolling_kv.wan.fused import fused_feed_forward, fused_forward, half_modulated_norm, narrowed_sum

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def on_any_device(monkeypatch):
    """What is chosen on CUDA runs on the CPU too."""
    monkeypatch.setattr(fused, "fuses_half", lambda x: x.dtype in HALF)


def block_and_inputs(batch, dtype, transposed=False):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24, cross_attn_norm=True).to(dtype)
    block = transformer.blocks[0]
    for module in (block.norm1, block.norm2, block.norm3):  # as files are loaded
        module.float()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    generator = torch.Generator().manual_seed(0)
    hidden, prompt, temb = (torch.randn(batch, n, 48, generator=generator).to(dtype) for n in (12, 5, 6))
    if transposed:
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    return block, (hidden, prompt, temb, transformer.rope(torch.zeros(batch, 16, 3, 4, 4)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("batch", [1, 2])
def test_sums_give_the_stock_lines_bits_but_for_one_rounding(dtype, batch):
    """Where a fused multiply-add rounds once instead of twice, one value in thousands is its neighbour."""
    generator = torch.Generator().manual_seed(0)
    x, added = torch.randn(2, batch, 500, 48, generator=generator).to(dtype)
    scale, shift = torch.randn(2, batch, 1, 48, generator=generator)
    norm = torch.nn.LayerNorm(48, elementwise_affine=False)
    for made, stock in [
        (narrowed_sum(x, added, scale), (x.float() + added * scale).type_as(x)),
        (half_modulated_norm(x, norm, scale, shift), (norm(x.float()) * scale + shift).type_as(x)),
    ]:
        assert made.dtype == dtype
        assert (made == stock).float().mean() >= 0.999
        torch.testing.assert_close(made, stock, atol=1e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("on_any_device")
def test_a_block_gives_what_the_stock_block_gives(dtype, batch, transposed):
    block, inputs = block_and_inputs(batch, dtype, transposed)
    before = inputs[0].clone()
    with torch.no_grad():
        made, stock = fused_forward(block, None)(*inputs), block(*inputs)
    assert (made == stock).float().mean() >= 0.97
    torch.testing.assert_close(made, stock, atol=4 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    assert torch.equal(inputs[0], before)
    assert made.is_contiguous()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("on_any_device")
def test_the_feed_forward_gives_the_stock_ones_to_rounding(dtype):
    block, (hidden, *_) = block_and_inputs(2, dtype)
    with torch.no_grad():
        made = fused_feed_forward(block.ffn, None)(hidden)
        exact = block.ffn.float()(hidden.float())
    torch.testing.assert_close(made.float(), exact, atol=3e-2 if dtype is torch.bfloat16 else 4e-3, rtol=0)


def test_where_half_precision_is_fused():
    x = torch.zeros(1, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        assert fused.fuses_half(x) and fused.fuses_half(x.half())
        assert not fused.fuses_half(x.float()) and not fused.fuses_half(torch.zeros(1, dtype=torch.bfloat16))
    assert not fused.fuses_half(x)  # with gradients, which sums into a given tensor do not have


def test_the_feed_forward_makes_way_without_the_product(monkeypatch):
    block, (hidden, *_) = block_and_inputs(1, torch.bfloat16)
    monkeypatch.setattr(fused, "fuses_half", lambda x: True)
    monkeypatch.setattr(fused, "CUBLAS_LINEAR", None)
    with torch.no_grad():
        assert torch.equal(fused_feed_forward(block.ffn, block.ffn.forward)(hidden), block.ffn(hidden))


def count_kernels(monkeypatch, counted):
    """Triton's kernels are not run: each tensor that one is given is read or written once, and counted where torch's are."""
    monkeypatch.setattr(fused, "kernels_run_on", lambda device: True)
    kernels = importlib.import_module("rolling_kv.wan.kernels")

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *given, **_):
            tensors = {id(one): one for one in given if isinstance(one, torch.Tensor)}.values()
            if counted.inside:
                counted.kernels.append((self.name, sum(one.numel() * one.itemsize for one in tensors)))

    for name in ("_norm", "_turn", "_widen", "_quantise"):
        monkeypatch.setattr(kernels, name, Kernel(name))


def counted_block(
    monkeypatch, heads, head_dim, batch=1, storage="model", fuse=True, triton=False, execution=None, time=500.0
):
    """What one block asks for in a pass over a chunk of 3 latent frames at 480x832, attention itself left out."""
    counted = Counted()
    if triton:
        count_kernels(monkeypatch, counted)
    if not fuse:
        for module in (fused, attachment):
            monkeypatch.setattr(module, "fuses_half", lambda x: False)
    monkeypatch.setattr(processors, "dispatch_attention_fn", lambda query, *_, **__: query)
    # One kernel on CUDA, which the meta device takes apart: this one reads and writes as much.
    monkeypatch.setattr(torch, "rms_norm", lambda x, shape, weight, eps: x * weight)
    transformer = transformer_on_meta(heads, head_dim)
    shape = CacheShape.of(transformer, batch, 60, 104, torch.bfloat16)
    cache = RollingKVCache(shape, CacheConfig(6, storage=storage), "meta")
    prompt = torch.empty(batch, 8, transformer.config.text_dim, device="meta", dtype=torch.bfloat16)
    part = Branch(cache, PromptCache(prompt))
    latents = torch.empty(batch, 16, 3, 60, 104, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), apply_rolling_kv_cache(transformer, execution) as attached:
        block = transformer.blocks[1]  # one that others stand before and behind
        forward = block.forward

        def counting(*inputs):
            with counted:
                return forward(*inputs)

        cache.begin(3)
        attached.forward(latents, 500.0, part)  # the prompt's keys
        block.forward = counting
        attached.forward(latents, time, part)
        del block.forward
    return counted, counted.nbytes / (batch * 4680 * heads * head_dim)


def transformer_on_meta(heads, head_dim):
    size = {"num_attention_heads": heads, "attention_head_dim": head_dim, "ffn_dim": heads * head_dim * 35 // 6}
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_layers=3, **size).to(torch.bfloat16)
    for block in transformer.blocks:
        block.scale_shift_table.data = block.scale_shift_table.data.float()
        for norm in (block.norm1, block.norm2, block.norm3):
            norm.float()
    return transformer


SIZES = [(12, 128, 1), (12, 128, 2), (40, 128, 1)]  # 1.3B, two of its videos at once, 14B


@pytest.mark.parametrize(("heads", "head_dim", "batch"), SIZES)
def test_kernels_and_bytes_of_a_block(monkeypatch, heads, head_dim, batch):
    """Beside its 8 products and its attention; bytes for each value of the chunk's [B, S, dim]."""
    fused_block, moved = counted_block(monkeypatch, heads, head_dim, batch)
    assert len(fused_block.products) == 8 and "_addmm_activation" in fused_block.products
    assert len(fused_block.kernels) == 26 and 138 <= moved <= 140
    stock_block, moved = counted_block(monkeypatch, heads, head_dim, batch, fuse=False)
    assert len(stock_block.products) == 8
    assert len(stock_block.kernels) == 39 and 249 <= moved <= 251


@pytest.mark.parametrize(("heads", "head_dim", "batch"), SIZES)
def test_kernels_and_bytes_of_a_block_whose_rotation_is_borrowed(monkeypatch, heads, head_dim, batch):
    """Without that of the rotation itself, which another package does in 2 kernels: 4 bytes a value, and the matrices."""
    monkeypatch.setattr(attachment, "rotation_on", lambda *where: lambda heads, turning: torch.empty_like(heads))
    block, moved = counted_block(monkeypatch, heads, head_dim, batch)
    assert len(block.kernels) == 20 and 97 <= moved <= 99


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
@pytest.mark.parametrize(("heads", "head_dim", "batch"), SIZES)
def test_kernels_and_bytes_of_a_block_with_triton(monkeypatch, heads, head_dim, batch):
    block, moved = counted_block(monkeypatch, heads, head_dim, batch, triton=True)
    assert len(block.products) == 8
    # The values of one video are written where the cache has them; those of two are copied there.
    assert len(block.kernels) == (9 if batch == 1 else 10)
    assert abs(moved - (37 if batch == 1 else 41)) < 1


STORED = [("float8", False, 32, 155), ("int8", False, 46, 219), ("float8", True, 12, 45), ("int8", True, 12, 45)]


@pytest.mark.parametrize(("storage", "triton", "kernels", "nbytes"), STORED)
def test_kernels_and_bytes_of_a_block_with_a_packed_cache(monkeypatch, storage, triton, kernels, nbytes):
    """A window of 6 frames, which every pass unpacks."""
    if triton and find_spec("triton") is None:
        pytest.skip("Triton is for Linux")
    block, moved = counted_block(monkeypatch, 12, 128, storage=storage, triton=triton)
    assert (len(block.kernels), round(moved)) == (kernels, nbytes)


@pytest.mark.parametrize(("triton", "kernels", "nbytes"), [(False, 69, 498), (True, 16, 73)], ids=["torch", "triton"])
def test_kernels_and_bytes_of_a_fast_block(monkeypatch, triton, kernels, nbytes):
    """All 8 products in float8: what goes into them is quantised in six turns, one for queries, keys and values.

    With torch's own operations that takes more than the products save: see `fast_on`.
    """
    if triton and find_spec("triton") is None:
        pytest.skip("Triton is for Linux")
    monkeypatch.setattr(fast, "fast_on", lambda *_: fast.Fast(None, True, ""))
    block, moved = counted_block(monkeypatch, 12, 128, triton=triton, execution=ExecutionConfig(fast=True))
    assert block.products == ["_scaled_mm"] * 8
    assert (len(block.kernels), round(moved)) == (kernels, nbytes)


ATTENDING = [("model", False, 38, 154), ("float8", False, 34, 154), ("model", True, 21, 52), ("float8", True, 14, 44)]


@pytest.mark.parametrize(("storage", "triton", "kernels", "nbytes"), ATTENDING)
def test_kernels_and_bytes_of_a_block_that_attends_in_float8(monkeypatch, storage, triton, kernels, nbytes):
    """Beside those of the standard block: 4 kernels and 5 bytes each for queries, keys and values, here of one chunk.

    A cache in float8 is read as it is: neither widened, which takes 2 kernels and 6 bytes, nor quantised.
    """
    if triton and find_spec("triton") is None:
        pytest.skip("Triton is for Linux")

    def attended(q, k, v, **_):
        return torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)

    monkeypatch.setattr(fast, "fast_on", lambda *_: fast.Fast(FLASH_3_FLOAT8, False, ""))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=attended))
    execution = ExecutionConfig(fast=True)
    block, moved = counted_block(monkeypatch, 12, 128, storage=storage, triton=triton, execution=execution)
    assert (len(block.kernels), round(moved)) == (kernels, nbytes)


@pytest.mark.parametrize(
    ("ways", "kernels", "nbytes"),
    [({"fuse": False}, 39, 250), ({}, 26, 139), ({"triton": True}, 9, 37)],
    ids=["stock", "torch", "triton"],
)
def test_kernels_and_bytes_of_a_block_with_a_timestep_for_each_frame(monkeypatch, ways, kernels, nbytes):
    if "triton" in ways and find_spec("triton") is None:
        pytest.skip("Triton is for Linux")
    block, moved = counted_block(monkeypatch, 12, 128, time=(1000.0, 500.0, 0.0), **ways)
    assert len(block.products) == 8
    assert (len(block.kernels), round(moved)) == (kernels, nbytes)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("on_any_device")
def test_a_block_gives_what_the_stock_block_gives_with_a_timestep_for_each_frame(dtype):
    block, (hidden, prompt, _, rotation) = block_and_inputs(2, dtype)
    temb = torch.randn(2, 3, 6, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        made = fused_forward(block, None)(hidden, prompt, temb, rotation)
        stock = block(hidden, prompt, temb.repeat_interleave(4, dim=1), rotation)
    assert (made == stock).float().mean() >= 0.97 and made.is_contiguous()
    torch.testing.assert_close(made, stock, atol=4 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


def test_what_a_block_has_made_is_for_the_very_tensor_that_it_gave():
    handed, x = fused.Handed(), torch.zeros(3)
    handed.give(x, "made")
    assert handed.take(torch.zeros(3)) is None and handed.take(x) is None, "it is gone once it was not taken"
    handed.give(x, "made")
    assert handed.take(x) == "made" and handed.take(x) is None
