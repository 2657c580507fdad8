"""Videos whose passes run as one batch: each is what it is alone, whenever it joins or leaves."""

from dataclasses import replace
from threading import Thread

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.together import Together
from rolling_kv.step_cache import METHODS
from rolling_kv.wan.attachment import is_attached
from rolling_kv.wan.offloaded import offload_blocks

SIZE = dict(height=32, width=32)
FEW = SamplingConfig(denoising_steps=(1000, 500))


@pytest.fixture(scope="module")
def model():
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24)
    return CausalModel(transformer, ModelPreset("cases", sampling=FEW, cache=CacheConfig(window=6)))


def prompt(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 8, model.transformer.config.text_dim, generator=generator)


def alone(model, seed, chunks, **settings):
    session = RollingSession(model, prompt(model, seed), **SIZE | settings)
    with session:
        for _ in session.generate(chunks, seed):
            pass
    return session.state


def passes_of(together):
    """How many videos each pass holds, in the order in which they are run."""
    (attachment,), counts = together._attachments, []
    run = attachment.forward_together
    attachment.forward_together = lambda latents, *given, **named: (
        counts.append(len(latents)) or run(latents, *given, **named)
    )
    return counts


CASES = {
    "plain": {},
    "guidance": {"sampling": replace(FEW, guidance_scale=2.0)},
    "sink": {"cache": CacheConfig(window=7, sink=1, positions="window")},
    "int8": {"cache": CacheConfig(window=6, storage="int8")},
    "offload": {"cache": CacheConfig(window=6, offload=True)},
    "all frames": {"cache": CacheConfig(window="all")},
    "rolling sampler": {"sampling": replace(FEW, sampler="rolling"), "cache": CacheConfig(window=9, sink=3)},
    "frame by frame": {"sampling": replace(FEW, chunk=1)},
}


@pytest.mark.parametrize("name", CASES)
def test_videos_of_any_length_are_what_they_are_alone(model, name):
    settings = dict(CASES[name])
    if "sampling" in settings and settings["sampling"].guided:
        settings["negative"] = prompt(model, 99)
    lengths = [2, 4, 3]
    with Together(model) as together:
        streams = [together.join(prompt(model, n), chunks, n, **SIZE | settings) for n, chunks in enumerate(lengths)]
        made = [(streams.index(stream), chunk) for stream, chunk in together.chunks()]
    assert [sum(number == n for number, _ in made) for n in range(3)] == lengths
    for n, stream in enumerate(streams):
        expected = alone(model, n, lengths[n], **settings)
        assert stream.error is None and stream.state.records == expected.records
        assert torch.equal(stream.state.latents(), expected.latents())
        parts = [chunk.latents for number, chunk in made if number == n]
        assert torch.equal(torch.cat(parts, 2), expected.latents())
    assert not is_attached(model.transformer)


def test_all_go_in_step_and_who_joins_comes_into_step_with_the_others(model):
    """Two videos, and a third that begins when they have made a chunk: its first pass waits for their context passes."""
    with Together(model) as together:
        counts = passes_of(together)
        streams = [together.join(prompt(model, n), 4, n, **SIZE) for n in range(2)]
        for stream, _ in together.chunks():
            if len(streams) == 2 and stream.state.frames == 3:
                streams.append(together.join(prompt(model, 2), 2, 2, **SIZE))
    assert sum(counts) == 2 * (4 * 2 + 3) + 2 * 2 + 1
    assert counts.count(3) >= 4 and counts[:2] == [2, 2]
    for n, stream in enumerate(streams):
        assert torch.equal(stream.state.latents(), alone(model, n, 4 if n < 2 else 2).latents())


def test_other_windows_and_prompts_that_change_stay_each_ones_own(model):
    other = CacheConfig(window=9, sink=2)
    with Together(model) as together:
        first = together.join(prompt(model, 0), 4, 0, **SIZE)
        second = together.join(prompt(model, 1), 4, 1, cache=other, **SIZE)
        for stream, _ in together.chunks():
            if stream is first and stream.state.frames == 3:
                first.session.set_prompt(prompt(model, 7), switch="causal")
    assert torch.equal(second.state.latents(), alone(model, 1, 4, cache=other).latents())
    changed = [record.switch for record in first.state.records]
    assert "causal" in changed and changed.index("causal") in (1, 2)  # the next chunk, unless it has begun already


def test_a_video_goes_on_from_a_state_beside_one_that_begins(model):
    before = alone(model, 3, 2)
    with Together(model) as together:
        new = together.join(prompt(model, 4), 2, 4, **SIZE)
        old = together.join(prompt(model, 3), 2, 3, state=before, **SIZE)
        list(together.chunks())
    assert torch.equal(old.state.latents(), alone(model, 3, 4).latents())
    assert torch.equal(new.state.latents(), alone(model, 4, 2).latents())


def test_who_leaves_ends_with_a_whole_chunk_and_who_fails_stops_nobody(model, monkeypatch):
    with Together(model) as together:
        stays, leaves, fails = (together.join(prompt(model, n), 4, n, **SIZE) for n in range(3))
        monkeypatch.setattr(fails.session, "on_pass", lambda done, total: 1 / 0 if done > 3 else None)
        for stream, _ in together.chunks():
            if stream is leaves:
                leaves.leave()
    assert isinstance(fails.error, ZeroDivisionError) and leaves.error is stays.error is None
    assert leaves.state.frames in (3, 6)  # its next chunk may have begun
    assert torch.equal(leaves.state.latents(), alone(model, 1, leaves.state.frames // 3).latents())
    assert torch.equal(stays.state.latents(), alone(model, 0, 4).latents())


def test_what_a_pass_raises_ends_those_that_were_in_it(model, monkeypatch):
    with Together(model) as together:
        one, two = (together.join(prompt(model, n), 2, n, **SIZE) for n in range(2))
        (attachment,) = together._attachments
        monkeypatch.setattr(attachment, "_run", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        assert list(together.chunks()) == []
    assert "out of memory" in str(one.error) and "out of memory" in str(two.error)


def test_leaving_early_ends_all_threads(model):
    with Together(model) as together:
        streams = [together.join(prompt(model, n), 50, n, **SIZE) for n in range(3)]
        made = together.chunks()
        next(made)
        made.close()
        for stream in streams:
            stream.thread.join(10)
            assert not stream.thread.is_alive()
    assert not is_attached(model.transformer)


def test_ctrl_c_in_a_pass_ends_all_threads(model, monkeypatch):
    def cancelled(*_):
        raise KeyboardInterrupt

    with Together(model) as together:
        streams = [together.join(prompt(model, n), 50, n, **SIZE) for n in range(2)]
        (attachment,) = together._attachments
        made, ended = together.chunks(), []
        next(made)
        monkeypatch.setattr(attachment, "_run", cancelled)

        def go_on():
            try:
                list(made)
            except KeyboardInterrupt as error:
                ended.append(error)

        caller = Thread(target=go_on, daemon=True)  # where nobody is told, this waits for ever
        caller.start()
        caller.join(20)
        assert ended
        for stream in streams:
            stream.thread.join(10)
            assert not stream.thread.is_alive()


@pytest.mark.parametrize("begun", [False, True])
def test_leaving_without_having_asked_for_all_chunks_ends_all_threads(model, begun):
    with pytest.raises(OSError, match="something else"), Together(model) as together:
        streams = [together.join(prompt(model, n), 50, n, **SIZE) for n in range(2)]
        made = together.chunks()
        if begun:
            next(made)
        raise OSError("something else")
    for stream in streams:
        stream.thread.join(10)
        assert not stream.thread.is_alive()
    assert list(made) == [] and not is_attached(model.transformer)


def test_what_cannot_be_together_is_refused(model):
    with pytest.raises(ValueError, match="passes of one video"):
        Together(model, ExecutionConfig(cuda_graphs=True))
    together = Together(model)
    with pytest.raises(ValueError, match="inside"):
        together.join(prompt(model, 0), 1, **SIZE)
    with together:
        with pytest.raises(ValueError, match="step cache"):
            together.join(prompt(model, 0), 1, step_cache=next(iter(METHODS.values()))(), **SIZE)
        with pytest.raises(ValueError, match="multiple"):
            together.join(prompt(model, 0), 1, height=31, width=32)
        assert list(together.chunks()) == []


def test_weights_in_cpu_memory_come_for_all_at_once(model):
    expected = [alone(model, n, 2).latents() for n in range(2)]
    blocks = offload_blocks(model.transformer, "cpu")
    try:
        with Together(model) as together:
            counts = passes_of(together)
            streams = [together.join(prompt(model, n), 2, n, **SIZE) for n in range(2)]
            list(together.chunks())
    finally:
        blocks.remove()
    assert set(counts) == {2} and all(
        torch.equal(stream.state.latents(), one) for stream, one in zip(streams, expected)
    )
