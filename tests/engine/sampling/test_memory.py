"""What a run is announced to take is what it takes, within bounds that halving or doubling a part would leave."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from builders import tiny_transformer
from videos import prompt

from rolling_kv.bench.gauges import TensorBytes
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import ALL_FRAMES, CacheConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.session import RollingSession

SAMPLING = SamplingConfig(chunk=3, denoising_steps=(1000, 500))
SIZE = dict(height=96, width=96)


@pytest.fixture(scope="module")
def model():
    transformer = tiny_transformer(num_attention_heads=4, attention_head_dim=24, num_layers=3, ffn_dim=384)
    return CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(6)))


def announced(model, **settings):
    options = dict(sampling=SAMPLING, cache=model.preset.cache, prompt_tokens=6) | settings
    return estimate(model.transformer, **SIZE, **options)


def peak(model, sampling=SAMPLING, cache=None, batch=1):
    """Most bytes of tensors alive while three chunks are made, beside the weights and the finished video."""
    negative = prompt(model, 1, batch) if sampling.guided else None
    with TensorBytes() as counted:
        session = RollingSession(
            model, prompt(model, 0, batch), negative=negative, sampling=sampling, cache=cache, batch=batch, **SIZE
        )
        with session:
            list(session.generate(3))
    return counted.peak - session.state.nbytes


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_runs_peak_is_about_what_was_announced(model, guidance, batch):
    sampling = replace(SAMPLING, guidance_scale=guidance)
    needed = announced(model, sampling=sampling, batch=batch)
    held = peak(model, sampling=sampling, batch=batch)
    assert held <= 1.1 * needed.device <= 1.6 * held


def test_activations_are_those_of_a_whole_chunk(model):
    """The cache is as small as it can be, so what is left of the peak are the activations of one pass."""
    small = CacheConfig(3)
    needed = announced(model, cache=small)
    activations = peak(model, cache=small) - needed.cache - needed.prompts
    assert 0.7 * needed.activations <= activations <= 1.2 * needed.activations


def test_a_switch_in_one_pass_takes_the_activations_of_the_window(model):
    wide = CacheConfig(9)
    needed = announced(model, cache=wide, frames=12, joint_switch=True)
    assert needed.activations == 3 * announced(model, cache=wide, frames=12).activations
    assert (
        announced(model, cache=CacheConfig(ALL_FRAMES), frames=12, joint_switch=True).activations > needed.activations
    )
    with TensorBytes() as counted:
        with RollingSession(model, prompt(model, 0), cache=wide, sampling=SAMPLING, **SIZE) as session:
            list(session.generate(3))
            session.set_prompt(prompt(model, 1), switch="joint")
            list(session.generate(1))
    activations = counted.peak - session.state.nbytes - needed.cache - needed.prompts
    assert 0.6 * needed.activations <= activations <= 1.2 * needed.activations


def test_each_size_counts_once(model):
    plain = announced(model)
    assert announced(model, batch=2).device == 2 * plain.device
    guided = announced(model, sampling=replace(SAMPLING, guidance_scale=2.0))
    assert (guided.cache, guided.prompts) == (2 * plain.cache, 2 * plain.prompts)
    assert guided.activations == plain.activations  # one branch after the other
    assert announced(model, cache=CacheConfig(12)).cache == 2 * plain.cache
    assert announced(model, sampling=replace(SAMPLING, chunk=6)).activations == 2 * plain.activations
    assert announced(model, dtype=torch.bfloat16).cache * 2 == plain.cache
    assert announced(model, prompt_tokens=12).prompts == 2 * plain.prompts


def test_an_offloaded_cache_is_announced_where_it_lies(model):
    plain, offloaded = announced(model), announced(model, cache=CacheConfig(6, offload=True))
    assert plain.host == 0 and offloaded.host == plain.cache
    assert offloaded.cache == plain.cache // 3 * 2  # two of three layers at a time
    guided = announced(model, cache=CacheConfig(6, offload=True), sampling=replace(SAMPLING, guidance_scale=2.0))
    assert guided.host == 2 * offloaded.host


@pytest.mark.parametrize("window, before, after", [(6, 0, 2), (ALL_FRAMES, 1, 2)], ids=["window", "all frames"])
def test_an_offloaded_cache_finds_room_for_all_branches_or_none(model, window, before, after, monkeypatch):
    """Each branch alone would find room for itself: memory that nobody has touched yet counts as available.

    before, after: chunks made with plenty of memory, then with as much as the test says. Six frames are new then.
    """
    cache, sampling = CacheConfig(window, offload=True), replace(SAMPLING, guidance_scale=2.0)
    one = announced(model, cache=CacheConfig(6, offload=True)).host

    def made(available):
        words = [prompt(model, seed) for seed in (0, 1)]
        session = RollingSession(model, words[0], negative=words[1], sampling=sampling, cache=cache, **SIZE)
        with monkeypatch.context() as memory:
            if not before:
                memory.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
            with session:
                list(session.generate(before))
                memory.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
                list(session.generate(after))
        return session.state

    assert made(2 * one).frames == 3 * (before + after)
    with pytest.raises(ValueError, match="offloading the cache needs .* GiB of RAM"):
        made(2 * one - 1)


def test_what_is_not_offloaded_asks_for_no_room_in_ram(model, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    with RollingSession(model, prompt(model), cache=CacheConfig(ALL_FRAMES), **SIZE) as session:
        assert len(list(session.generate(3))) == 3
