"""Video to video in chunks: each begins as given latents with noise, and takes the steps of a strength."""

from dataclasses import replace

import pytest
import torch
from stand_in_vae import StandInVae
from videos import HEIGHT, SAMPLING, WIDTH, WINDOW, prompt, same, sample, small_model

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.sampling.schedule import seeded_noise, warp_steps
from rolling_kv.sampling.session import RollingSession

SOURCE = torch.randn(1, 16, 9, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))
RULES = {
    "kept": WINDOW,
    "recomputed": CacheConfig(4, context="recomputed"),
    "averaged": CacheConfig(6, 2, leaving="ema"),
}


@pytest.fixture(scope="module")
def model():
    return small_model()


def changed(model, chunks, at=0, state=None, seed=7, source=SOURCE, strength=0.5, **settings):
    """A video of which the next chunks begin as the source from frame `at` on."""
    with RollingSession(
        model, prompt(model), height=HEIGHT, width=WIDTH, state=state, vae=StandInVae(), **settings
    ) as session:
        list(session.generate(chunks, seed=seed, source=source[:, :, at:], strength=strength))
    return session.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_begins_as_the_source_with_noise(dtype, monkeypatch):
    from rolling_kv.sampling import session as module

    model, begun = small_model(), []
    model.transformer.to(dtype)
    original = module.sample_chunk

    def watched(predict, noise, sampling, start):
        begun.append((noise(0), sampling))
        return original(predict, noise, sampling, start)

    monkeypatch.setattr(module, "sample_chunk", watched)
    changed(model, 2, at=1, state=sample(model, 1))
    for number, (x, sampling) in enumerate(begun[1:]):
        level = warp_steps((500,), sampling.shift)[0].timestep / 1000
        noise = seeded_noise(7, 2 + 2 * number, (1, 16, 2, HEIGHT // 8, WIDTH // 8), 0)
        source, noise = (x.to(dtype).float() for x in (SOURCE[:, :, 1 + 2 * number :][:, :, :2], noise))
        torch.testing.assert_close(x, (source * (1 - level) + noise * level).to(dtype))
        assert sampling.denoising_steps == (500, 250)


@pytest.mark.parametrize("cache", RULES.values(), ids=RULES)
def test_any_cut_gives_the_same_bits(model, cache):
    whole = changed(model, 4, cache=cache)
    part = changed(model, 1, cache=cache)
    part = changed(model, 2, at=2, state=part, cache=cache)
    assert same(changed(model, 1, at=6, state=part, cache=cache), whole)
    assert not torch.equal(whole.chunks[0], sample(model, 1, cache=cache).chunks[0])


def test_the_weaker_the_closer(model):
    def distance(strength):
        return (changed(model, 1, strength=strength).latents() - SOURCE[:, :, :2]).norm()

    distances = [distance(strength) for strength in (0.02, 0.2, 1.0)]
    assert distances == sorted(distances)


def test_at_full_strength_nothing_of_it_stays(model):
    assert same(changed(model, 2, strength=1.0), sample(model, 2))


def test_progress_and_a_single_first_frame(model):
    single, counted = replace(SAMPLING, chunk=3, independent_first_frame=True), []
    state = changed(model, 3, sampling=single, cache=CacheConfig(7, 1), on_pass=lambda *pair: counted.append(pair))
    assert [record.frames for record in state.records] == [1, 3, 3]
    assert counted == [(done, len(counted)) for done in range(len(counted))]


def test_each_first_chunk_has_its_own_steps_scaled():
    sampling = SamplingConfig(denoising_steps=(1000, 100), first_chunk_steps=((1000, 736, 100), (1000, 500)))
    weaker = sampling.at_strength(0.5)
    assert weaker.denoising_steps == (500, 50) and weaker.first_chunk_steps == ((500, 368, 50), (500, 250))


def test_a_source_that_comes_frame_by_frame_is_read_chunk_by_chunk(model):
    read = []

    def frames():
        for index, frame in enumerate(SOURCE.split(1, dim=2)):
            read.append(index)
            yield frame

    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        for number, _ in enumerate(session.generate(4, seed=7, source=frames(), strength=0.5), start=1):
            assert len(read) == 2 * number
    assert same(session.state, changed(model, 4))


@pytest.mark.parametrize("strength", [hundredths / 100 for hundredths in range(1, 101)])
def test_kreas_steps_of_every_strength(strength):
    steps = torch.linspace(1000 * strength, 0, 5).int().tolist()
    sampling = SamplingConfig(denoising_steps=(1000, 750, 500, 250, 0))
    assert sampling.at_strength(strength).denoising_steps == tuple(steps)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(source=SOURCE[:, :, :5], chunks=3),
            "the latents to start from are 5 frames, and 3 chunks are 6: make fewer",
        ),
        (dict(source=SOURCE[:, :4], chunks=1), "the latents to start from must be .*channels 16"),
        (dict(strength=0.001), "strength 0.001 is too little for 2 steps: make it larger"),
        (dict(strength=0), "strength 0 is too little for 2 steps"),
        (dict(strength=1.5), "strength must be a number from 0 to 1, got 1.5"),
        (dict(sampling=replace(SAMPLING, sampler="unipc")), 'need the sampler "renoise", and this is "unipc"'),
    ],
)
def test_what_cannot_work_is_refused_before_any_pass(model, arguments, message):
    passes = []
    with pytest.raises(ValueError, match=message):
        changed(model, **{"chunks": 1} | arguments, on_pass=lambda *pair: passes.append(pair))
    assert not passes
