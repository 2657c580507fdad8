"""Rotation by another package: taken where it gives the same and is at least as fast. Nothing is timed here."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.rope import rotary_rotations, rotate
from rolling_kv.sampling.session import RollingSession
from rolling_kv.wan import attachment, borrowed, fused
from rolling_kv.wan.borrowed import matrices, quickest, rotation_on

CPU, SHAPE = torch.device("cpu"), (1, 6, 2, 16)


def apply_rope1(x, freqs_cis):
    """comfy-kitchen's, as its kernel for CUDA has it, with what that one asks for."""
    assert x.dtype in (torch.float16, torch.bfloat16) and x.ndim == 4 and x.shape[-1] % 4 == 0 and x.is_contiguous()
    assert freqs_cis.dtype == torch.float32 and freqs_cis.ndim == 6 and freqs_cis.is_contiguous()
    batch, tokens, heads, pairs, *matrix = freqs_cis.shape
    assert batch in (1, x.shape[0]) and (tokens, heads) == (x.shape[1], 1)
    assert pairs == x.shape[-1] // 2 and matrix == [2, 2]
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rows = [freqs_cis[..., row, 0] * first + freqs_cis[..., row, 1] * second for row in (0, 1)]
    return torch.stack(rows, -1).flatten(-2).to(x.dtype)


class Registry:
    """As comfy-kitchen's, with the signature of what finds a function."""

    def __init__(self, found=apply_rope1):
        self.found = found

    def get_implementation(self, func_name, backend=None, kwargs=None):
        assert func_name == "apply_rope1" and backend is None and list(kwargs) == ["x", "freqs_cis"]
        return self.found


@pytest.fixture
def kitchen(monkeypatch):
    registry = Registry()
    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(registry=registry))
    return registry


def clock(*readings):
    left = iter(readings)
    return lambda work, device: (work(), next(left))[1]


def choice(*readings):
    return quickest(borrowed.ROTATIONS, CPU, torch.bfloat16, SHAPE, clock(*readings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_matrices_turn_as_complex_numbers_do(dtype, batch):
    heads = torch.randn(2, 24, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = [rotary_rotations(16, 5 + n, 2, 3, 4, torch.complex64)[None, :, None] for n in range(batch)]
    rotation = torch.cat(parts)
    made, plain = apply_rope1(heads, matrices(rotation)), rotate(heads, rotation)
    assert (made == plain).float().mean() > 0.99
    torch.testing.assert_close(made, plain, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_the_faster_one_is_taken_and_that_is_said(kitchen, caplog):
    caplog.set_level(logging.INFO)
    assert choice(0.4, 0.1) is apply_rope1 and choice(0.2, 0.2) is apply_rope1
    assert choice(0.1, 0.2) is None
    assert [record.message for record in caplog.records] == [
        "Rotation of 1x6x2x16: PyTorch 0.400 ms, comfy_kitchen 0.100 ms",
        "Rotation of 1x6x2x16: PyTorch 0.200 ms, comfy_kitchen 0.200 ms",
        "Rotation of 1x6x2x16: PyTorch 0.100 ms, comfy_kitchen 0.200 ms",
    ]


def split_in_halves(x, freqs_cis):
    return apply_rope1(x.unflatten(-1, (2, -1)).mT.flatten(-2).contiguous(), freqs_cis)


def in_other_bits(x, freqs_cis):
    return apply_rope1(x, freqs_cis.bfloat16().float())


@pytest.mark.parametrize("wrong", [split_in_halves, in_other_bits, lambda x, freqs_cis: x.float()])
def test_one_that_gives_other_numbers_is_left_aside(kitchen, caplog, wrong):
    caplog.set_level(logging.INFO)
    kitchen.found = wrong
    assert choice(0.4) is None and "comfy_kitchen gives other numbers" in caplog.text


def test_one_that_cannot_run_is_left_aside(kitchen, caplog):
    caplog.set_level(logging.INFO)

    def no_backend(x, freqs_cis):
        raise RuntimeError("no kernel image\nand more")

    kitchen.found = no_backend
    assert choice(0.4) is None and "comfy_kitchen cannot (no kernel image)" in caplog.text
    del sys.modules["comfy_kitchen"].registry  # as in a version that has none
    assert choice(0.4) is None and "comfy_kitchen cannot (" in caplog.messages[-1]


def test_it_is_looked_for_on_cuda_and_timed_once(monkeypatch):
    asked = []
    monkeypatch.setattr(borrowed, "quickest", lambda *what: asked.append(what) or apply_rope1)
    monkeypatch.setattr(borrowed, "find_spec", lambda package: None)
    rotation_on.cache_clear()
    cuda = torch.device("cuda")
    assert rotation_on(CPU, torch.bfloat16, 12, 128) is None is rotation_on(cuda, torch.bfloat16, 12, 128)
    monkeypatch.setattr(borrowed, "find_spec", lambda package: package)
    rotation_on.cache_clear()
    for _ in range(2):
        assert rotation_on(cuda, torch.bfloat16, 12, 128) is apply_rope1
    assert [what[1:] for what in asked] == [(cuda, torch.bfloat16, (1, 4680, 12, 128))]
    rotation_on.cache_clear()


def video(execution=None):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=16).to(torch.bfloat16)
    sampling = SamplingConfig(chunk=2, denoising_steps=(1000, 500))
    model = CausalModel(transformer, ModelPreset("test", sampling, CacheConfig(5, sink=1)))
    prompt = torch.randn(1, 6, transformer.config.text_dim, generator=torch.Generator().manual_seed(0))
    with RollingSession(model, prompt, execution=execution, height=32, width=48) as session:
        for _ in session.generate(4, seed=7):
            pass
    return session.state.latents().float()


def test_a_video_is_the_same_to_rounding(monkeypatch):
    for module in (fused, attachment):  # as on a GPU
        monkeypatch.setattr(module, "fuses_half", lambda x: x.dtype == torch.bfloat16)
    turned, asked = [], []

    def turning(x, freqs_cis):
        turned.append(len(x))
        return apply_rope1(x, freqs_cis)

    plain = video()
    monkeypatch.setattr(attachment, "rotation_on", lambda *what: asked.append(what) or turning)
    made = video()
    assert (made - plain).norm() < 0.02 * plain.norm()
    # Queries and keys in 2 layers: in each of 4 chunks 2 steps, and 3 context passes, whose last block ends with its keys.
    assert len(turned) == 4 * 8 + 3 * 3 and set(asked) == {(CPU, torch.bfloat16, 2, 16)}
    turned.clear()
    for execution in (ExecutionConfig(exact=True), ExecutionConfig(plain=True)):
        video(execution)
    monkeypatch.setattr(attachment, "fuses_half", lambda x: False)
    assert torch.equal(video(), plain) and not turned


def test_where_triton_makes_the_kernels_nothing_is_borrowed(monkeypatch):
    monkeypatch.setattr(attachment, "fuses_half", lambda x: True)
    monkeypatch.setattr(attachment, "rotation_on", lambda *what: apply_rope1)
    with attachment.apply_rolling_kv_cache(tiny_transformer().to(torch.bfloat16)) as attached:
        assert attached._borrowed() is apply_rope1
        attached.context.kernels = "kernels"
        assert attached._borrowed() is None
        attached.context.kernels, attached.execution = None, ExecutionConfig(compile=True)
        assert attached._borrowed() is None
