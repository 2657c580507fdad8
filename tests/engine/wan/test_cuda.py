"""What only a GPU can show. Skipped where there is none."""

from dataclasses import replace

import pytest
import torch
from builders import tiny_transformer
from cases import load_cases

from rolling_kv.cache.codecs import CODECS
from rolling_kv.cache.pinned import HostMemory
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import SAMPLERS, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState
from rolling_kv.wan.fast import fast_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SAMPLING = SamplingConfig(chunk=2, denoising_steps=(1000, 750, 500))
WINDOW = CacheConfig(5, sink=1)
FLOAT32 = [case for case in load_cases() if case.dtype == "float32" and not case.quirk]


def model(dtype=torch.float32):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=64, num_layers=4).to("cuda", dtype)
    return CausalModel(transformer, ModelPreset("test", SAMPLING, WINDOW))


def video(model, *, chunks=9, prompts=1, **options):
    """prompts: how many there are, each for so many chunks."""
    first, *others = torch.randn(
        prompts, 1, 6, model.transformer.config.text_dim, generator=torch.Generator().manual_seed(0)
    )
    with RollingSession(model, first, height=64, width=96, **options) as session:
        for number in range(prompts):
            if number:
                session.set_prompt(others[number - 1])
            for _ in session.generate(chunks, seed=7):
                pass
    return session.state.latents().float()


@pytest.fixture
def nobody_waits(monkeypatch):
    """From the third chunk on, waiting for the device is an error, but for the finished chunk's way back.

    UniPC's corrector may wait, inside diffusers: torch.linalg.solve looks whether it has failed.
    """
    extended, solve = CacheState.extended, torch.linalg.solve

    def solve_and_wait(*system):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        solution = solve(*system)
        torch.cuda.set_sync_debug_mode(mode)
        return solution

    monkeypatch.setattr(torch.linalg, "solve", solve_and_wait)

    def quietly(state, *args, **log):
        torch.cuda.set_sync_debug_mode("default")
        longer = extended(state, *args, **log)
        torch.cuda.set_sync_debug_mode("error" if len(longer.chunks) >= 3 else "default")
        return longer

    monkeypatch.setattr(CacheState, "extended", quietly)
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_the_recorded_cases(case, monkeypatch):
    """Matrix products round differently here than on the CPU that made the recordings."""
    make = type(case).model
    monkeypatch.setattr(type(case), "model", lambda self, dtype: make(self, dtype).to("cuda"))
    torch.testing.assert_close(case.run(exact=True).cpu(), case.tensors["output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", [WINDOW, replace(WINDOW, storage="int8"), replace(WINDOW, offload=True)])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.usefixtures("nobody_waits")
def test_nothing_inside_a_chunk_waits_for_the_device(cache, sampler):
    sampling = replace(SAMPLING, sampler=sampler, num_inference_steps=4)
    video(model(torch.bfloat16), cache=cache, sampling=sampling)


def test_offloaded_memory_is_pinned_in_its_own_size_and_given_back():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    tensor = HostMemory(device).zeros((3, 1000), torch.bfloat16)
    assert tensor.is_pinned() and tensor.untyped_storage().nbytes() == tensor.nbytes
    there = torch.ones(3, 1000, dtype=torch.bfloat16, device=device)
    tensor.copy_(there, non_blocking=True)
    copy = tensor[1:].to(device, non_blocking=True)
    del tensor
    assert torch.equal(copy, there[1:])


def test_int8_makes_no_float32_copy():
    codec = CODECS["int8"](torch.bfloat16)
    parts = codec.pack(torch.randn(1, 4096, 12, 128, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = codec.unpack(parts)
    assert torch.cuda.max_memory_allocated() - before == made.nbytes == 4096 * 12 * codec.unpack_bytes(128)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_cuda_graphs_on_a_device_that_is_not_the_current_one():
    made = model()
    made.transformer.to("cuda:1")
    torch.testing.assert_close(video(made, execution=ExecutionConfig(cuda_graphs=True)), video(made))


@pytest.mark.parametrize("storage", ["model", "float8", "int8"])
def test_offloading_changes_no_bit(storage):
    made, cache = model(torch.bfloat16), replace(WINDOW, storage=storage)
    assert torch.equal(video(made, cache=cache), video(made, cache=replace(cache, offload=True)))


@pytest.mark.parametrize("storage", ["model", "int8"])
def test_cuda_graphs_change_the_rounding_at_most(storage):
    made, cache = model(), replace(WINDOW, storage=storage)
    torch.testing.assert_close(
        video(made, cache=cache, execution=ExecutionConfig(cuda_graphs=True)), video(made, cache=cache)
    )


def test_cuda_graphs_go_on_when_the_prompt_changes():
    made = model()
    torch.testing.assert_close(
        video(made, chunks=5, prompts=3, execution=ExecutionConfig(cuda_graphs=True)), video(made, chunks=5, prompts=3)
    )


def test_compiled_blocks_change_the_rounding_at_most():
    made = model()
    torch.testing.assert_close(video(made, execution=ExecutionConfig(compile=True)), video(made), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        video(made, execution=ExecutionConfig(compile=True, cuda_graphs=True)), video(made), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", CODECS)
def test_triton_kernels_are_as_near_to_float32_as_torchs_own(storage, dtype):
    cache = replace(WINDOW, storage=storage)
    exact, made = video(model(), cache=WINDOW, chunks=4), model(dtype)
    with_kernels = video(made, cache=cache, chunks=4)
    plain = video(made, cache=cache, chunks=4, execution=ExecutionConfig(plain=True))
    assert not torch.equal(with_kernels, plain)
    assert (with_kernels - exact).norm() <= 1.3 * (plain - exact).norm()


def test_fast_videos_are_near_the_standard_ones():
    """By whatever the card and what is installed give; see the remark for what that is."""
    made = model(torch.bfloat16)
    plain, recorded = video(made, chunks=4), ExecutionConfig(fast=True, cuda_graphs=True)
    as_fast = video(made, chunks=4, execution=ExecutionConfig(fast=True))
    assert (as_fast - plain).norm() <= 0.1 * plain.norm(), fast_for(recorded, made.transformer, torch.device("cuda"))
    torch.testing.assert_close(video(made, execution=recorded), video(made, execution=ExecutionConfig(fast=True)))


def test_memory_on_the_device_does_not_grow():
    made = model(torch.bfloat16)
    peaks = []
    for chunks in (9, 40):
        torch.cuda.reset_peak_memory_stats()
        latents = video(made, chunks=chunks)
        peaks.append(torch.cuda.max_memory_allocated() - latents.nbytes // 2)  # bfloat16 there, float32 here
    assert peaks[1] <= peaks[0] * 1.01
