"""A run that is larger than the memory is refused before anything is allocated, with settings that would fit."""

import re

import pytest
import torch
from builders import tiny_transformer

from rolling_kv import devices
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.pipeline import Pipeline
from rolling_kv.sampling import memory
from rolling_kv.sampling.memory import check_fits, estimate
from rolling_kv.tiny import make_tiny

HEIGHT, WIDTH = 64, 96
SAMPLING = SamplingConfig(denoising_steps=(1000, 500))
WINDOW_21 = CacheConfig(21)
CPU = torch.device("cpu")
PER_FRAME = 16 * 8 * 12 * 4
"""Bytes of one finished latent frame of that size."""


@pytest.fixture
def available(monkeypatch):
    """Set how much RAM there is."""

    def set_to(nbytes):
        for module in (devices, memory):
            monkeypatch.setattr(module, "available_memory", lambda: nbytes)

    return set_to


def fits(cache=WINDOW_21, frames=21, device=CPU, **options):
    settings = dict(sampling=SAMPLING, cache=cache, device=device, frames=frames) | options
    check_fits(tiny_transformer(), HEIGHT, WIDTH, **settings)


def needed(cache=WINDOW_21, frames=21, sampling=SAMPLING):
    run = estimate(tiny_transformer(), HEIGHT, WIDTH, sampling=sampling, cache=cache, frames=frames)
    return run.device + run.host + frames * PER_FRAME


@pytest.mark.parametrize(
    "cache, sampling",
    [
        (CacheConfig(21), SAMPLING),
        (CacheConfig("all", storage="int8"), SAMPLING),
        (CacheConfig(21, offload=True), SAMPLING),
        (CacheConfig(21), SamplingConfig(guidance_scale=3.0)),
    ],
)
def test_on_a_cpu_everything_counts_to_the_byte(cache, sampling, available):
    total = needed(cache, sampling=sampling)
    available(total)
    fits(cache, sampling=sampling)
    available(total - 1)
    with pytest.raises(ValueError, match="this video needs .* GiB of RAM, and .* GiB are available"):
        fits(cache, sampling=sampling)


def test_beside_a_gpu_the_offloaded_cache_and_the_finished_latents_count(available):
    gpu, finished = torch.device("cuda"), 21 * PER_FRAME
    available(finished)
    fits(device=gpu, decoding=10**12)
    available(finished - 1)
    with pytest.raises(ValueError, match="this video needs"):
        fits(device=gpu)
    offloaded = CacheConfig(21, offload=True)
    kept = estimate(tiny_transformer(), HEIGHT, WIDTH, sampling=SAMPLING, cache=offloaded).host
    available(finished + kept - 1)
    with pytest.raises(ValueError, match="this video needs"):
        fits(offloaded, device=gpu)


def test_decoding_takes_turns_with_the_passes_and_what_is_held_is_not_needed_again(available):
    total = needed()
    activations = estimate(tiny_transformer(), HEIGHT, WIDTH, sampling=SAMPLING, cache=CacheConfig(21)).activations
    available(total)
    fits(decoding=activations)
    with pytest.raises(ValueError):
        fits(decoding=activations + 1)
    fits(decoding=activations + 1, held=1)


def test_the_window_and_the_storage_that_are_named_fit_and_no_larger_window_does(available):
    wide = CacheConfig(400, sink=1)
    available(needed(CacheConfig(50)) + 10)
    with pytest.raises(ValueError) as refused:
        fits(wide)
    (window,) = map(int, re.findall(r"set the window to at most (\d+) latent frames", str(refused.value)))
    fits(CacheConfig(window, sink=1))
    with pytest.raises(ValueError):
        fits(CacheConfig(window + 1, sink=1))
    assert window == 50 and "keep the cache as" not in str(refused.value)
    available(needed(CacheConfig(400, storage="int8")))
    with pytest.raises(ValueError, match="keep the cache as .*int8.*, make the picture smaller"):
        fits(wide)


def test_what_cannot_help_is_not_advised(available):
    available(PER_FRAME)
    with pytest.raises(ValueError, match=r"available: make the picture smaller, or close other programs$"):
        fits()
    available(needed(frames=10**6) - 1)
    with pytest.raises(ValueError, match="make the video shorter"):
        fits(frames=10**6)


def test_numbers_beyond_all_measure_are_refused_at_once(available):
    available(2**40)
    for settings in (
        dict(frames=10**30),
        dict(cache=CacheConfig("all"), frames=10**30),
    ):
        with pytest.raises(ValueError, match="this video needs"):
            fits(**settings)


def test_a_pipeline_refuses_before_it_samples_or_writes(available, tmp_path, monkeypatch):
    pipeline = Pipeline.load(make_tiny(tmp_path / "tiny"))
    monkeypatch.setattr(type(pipeline.text_encoder), "encode", lambda *_: pytest.fail("began"))
    available(10**6)
    with pytest.raises(ValueError, match="this video needs"):
        pipeline.generate("x", tmp_path / "video.mp4", height=64, width=64, seconds=1)
    assert not (tmp_path / "video.mp4").exists()
