"""A run that has used up the memory says what it takes, what there is, and what would fit."""

import re

import pytest
import torch
from builders import tiny_transformer
from videos import HEIGHT, SAMPLING, WIDTH, prompt, small_model

from rolling_kv import devices
from rolling_kv.cli import main
from rolling_kv.config import CacheConfig
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.shortage import OutOfMemory, telling_shortage
from rolling_kv.tiny import make_tiny
from rolling_kv.wan.offloaded import offload_blocks, spared_by_offloading

GPU = torch.device("cuda")
WIDE = CacheConfig(60, sink=1)


MODEL = tiny_transformer(num_layers=6)


def taken(cache):
    weights = sum(parameter.nbytes for parameter in MODEL.parameters())
    return weights + estimate(MODEL, HEIGHT, WIDTH, sampling=SAMPLING, cache=cache, frames=90).device


def shortage(monkeypatch, room, cache=WIDE, error=None, device=GPU, **others):
    """What is said where that many bytes can be had."""
    monkeypatch.setattr("rolling_kv.sampling.shortage.obtainable_memory", lambda device: room)
    around = dict(sampling=SAMPLING, cache=cache, device=device, frames=90, **others)
    with pytest.raises(OutOfMemory) as told, telling_shortage(MODEL, HEIGHT, WIDTH, **around):
        raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    return str(told.value)


def test_it_names_settings_that_fit_and_no_larger_window_does(monkeypatch):
    said = shortage(monkeypatch, taken(CacheConfig(20, sink=1)) + 10)
    assert "set the window to at most 20 latent frames" in said
    assert "the memory of cuda is used up: this run takes about 0.0 GiB there" in said
    assert said.endswith("make the picture smaller, or close other programs")
    assert "keep the cache" not in said
    assert "int8" in shortage(monkeypatch, taken(CacheConfig(60, sink=1, storage="int8")))
    assert "offload the cache to CPU memory" in shortage(monkeypatch, taken(CacheConfig(60, sink=1, offload=True)))


def test_where_more_was_needed_than_expected_less_is_advised(monkeypatch):
    (window,) = re.findall(r"at most (\d+) latent frames", shortage(monkeypatch, 2**40))
    assert taken(CacheConfig(int(window), sink=1)) <= 0.9 * taken(WIDE)
    assert taken(CacheConfig(int(window) + 1, sink=1)) > 0.9 * taken(WIDE)


def test_offloading_is_no_advice_where_all_memory_is_the_same_or_it_is_done(monkeypatch):
    room = taken(CacheConfig(20, sink=1))
    assert "offload" not in shortage(monkeypatch, room, device=torch.device("cpu"))
    assert "offload" not in shortage(monkeypatch, 10, CacheConfig(60, sink=1, offload=True))


def test_offloading_the_weights_is_advised_where_that_is_enough(monkeypatch):
    spared = spared_by_offloading(MODEL)
    said = "offload the weights to CPU memory"
    assert spared and said in shortage(monkeypatch, taken(WIDE) - spared)
    assert said not in shortage(monkeypatch, taken(WIDE) - spared - 1)
    assert said not in shortage(monkeypatch, taken(WIDE) - spared, device=torch.device("cpu"))
    blocks = offload_blocks(MODEL, "cpu")
    try:
        assert said not in shortage(monkeypatch, taken(WIDE) - spared)
    finally:
        blocks.remove()


def test_leaving_fast_is_advised_where_its_copy_of_the_weights_is_too_much(monkeypatch):
    spared, products = spared_by_offloading(MODEL), taken(WIDE)
    said = "set the speed to standard instead of fast"
    assert said in shortage(monkeypatch, taken(WIDE), products=products)
    assert said not in shortage(monkeypatch, taken(WIDE) - 1, products=products)
    assert said not in shortage(monkeypatch, taken(WIDE))
    offload = "offload the weights to CPU memory"
    assert offload in shortage(monkeypatch, taken(WIDE) - spared, products=products)
    assert offload not in shortage(monkeypatch, taken(WIDE) - spared - 1, products=products)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_way_to_be_told_of_it_counts(error, monkeypatch):
    assert devices.is_out_of_memory(error)
    assert "is used up" in shortage(monkeypatch, 10, error=error)


def test_other_errors_stay_what_they_are():
    around = dict(sampling=SAMPLING, cache=WIDE, device=GPU, frames=90)
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, telling_shortage(MODEL, HEIGHT, WIDTH, **around):
            raise error
        assert raised.value is error


def test_a_session_that_fails_so_can_go_on_afterwards(monkeypatch):
    model, passes = small_model(), []

    def fail(done, total):
        passes.append(done)
        if len(passes) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    session = RollingSession(
        model, prompt(model), height=HEIGHT, width=WIDTH, sampling=SAMPLING, cache=WIDE, on_pass=fail
    )
    around = dict(sampling=SAMPLING, cache=WIDE, device=torch.device("cpu"), frames=90)
    with pytest.raises(OutOfMemory), telling_shortage(model.transformer, HEIGHT, WIDTH, **around), session:
        list(session.generate(9, seed=7))
    done = len(session.state.chunks)
    with session:
        list(session.generate(1, seed=7))
    assert len(session.state.chunks) == done + 1


def test_the_command_line_says_it_in_one_line_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    folder, passes = make_tiny(tmp_path / "tiny"), []
    forward = torch.nn.Conv3d.forward

    def fail(self, x):
        if self.kernel_size == (1, 2, 2):  # the patch embedding: a pass
            passes.append(x)
        if len(passes) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv3d, "forward", fail)
    arguments = ["generate", "--model", folder, "--prompt", "x", "--output", tmp_path / "video.mp4"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--width", "32", "--height", "32", "--seconds", "2", "--device", "cpu"])
    said = str(ended.value)
    assert re.match(r"error: the memory of cpu is used up: this run takes about .* GiB", said), said
    assert "or close other programs" in said and "\n" not in said
    assert (tmp_path / "video.mp4").exists()
