"""Random rules and random scripts of switches, against a naive list of slots (`naive_rules`): the same videos."""

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from naive_rules import NaiveVideo
from videos import HEIGHT, WIDTH, prompt, small_model

from rolling_kv.cache.sizes import CacheShape
from rolling_kv.config import ALL_FRAMES, CacheConfig, SamplingConfig
from rolling_kv.sampling.schedule import chunk_noise, seeded_noise
from rolling_kv.sampling.session import RollingSession

LATENTS = HEIGHT // 8, WIDTH // 8
ONE, TWO = (SamplingConfig(chunk=chunk, denoising_steps=(1000,)) for chunk in (1, 2))
CLEAN_SHOTS = CacheConfig(8, 2, "window", cut_flush=False, shot_sink=True, shot_clean=True)
SHOTS = CacheConfig(8, 2, "window", cut_flush=False, shot_sink=True)
NEW_AVERAGES = CacheConfig(6, 2, "window", span=9, leaving="ema", ema_alpha=0.5, global_sink=False)


@st.composite
def settings_of_a_video(draw):
    chunk = draw(st.integers(1, 3))
    sampling = SamplingConfig(
        chunk=chunk,
        denoising_steps=(1000, 500),
        independent_first_frame=draw(st.integers(0, 5)) == 5,
        guidance_scale=draw(st.sampled_from([1.0, 1.0, 1.0, 2.0])),
        context_noise=draw(st.sampled_from([0, 50])),
    )
    leaving = draw(st.sampled_from(["drop", "drop", "ema", "memory"]))
    sink = chunk if leaving == "ema" else draw(st.integers(0, 5))
    spare = draw(st.integers(0, 2)) * chunk if leaving == "ema" else draw(st.integers(0, 6))
    window = sink + 2 * (leaving == "memory") + chunk + spare
    window = draw(st.sampled_from([window, window, window, ALL_FRAMES])) if leaving == "drop" else window
    positions = "window" if leaving == "memory" else draw(st.sampled_from(["absolute", "window"]))
    shots = leaving == "drop" and draw(st.booleans())
    spanned = positions == "window" and window != ALL_FRAMES and not shots and draw(st.booleans())
    clean = draw(st.booleans())
    cache = CacheConfig(
        window,
        sink=sink,
        positions=positions,
        span=window + draw(st.integers(0, 9)) if spanned else None,
        leaving=leaving,
        ema_alpha=0.5,
        memory_alphas=(0.3, 0.8),
        global_sink=draw(st.booleans()),
        cut_flush=not clean and draw(st.booleans()),
        cut_offset=draw(st.sampled_from([0, 2.5, 8, 42])),
        shot_sink=shots,
        shot_clean=clean,
    )
    sampling.check_cache(cache)
    return cache, sampling


@st.composite
def videos(draw):
    """Settings, and how each chunk comes about: its prompt, its switch, and how many frames are given; 0: it is sampled."""
    cache, sampling = draw(settings_of_a_video())
    switches = ["hold", "joint", "causal", *(["flush", "cut"] if cache.leaving == "drop" else [])]
    chunk = st.tuples(st.integers(0, 2), st.sampled_from(["hold", *switches]), st.sampled_from([0, 0, 0, 0, 0, 3]))
    return cache, sampling, draw(st.lists(chunk, min_size=4, max_size=12))


@pytest.fixture(scope="module")
def model():
    return small_model()


def script(*switches, chunks=10):
    """A prompt that changes at every switch; (chunk, switch) each."""
    return [(number % 3, dict(switches).get(number, "hold"), 0) for number in range(chunks)]


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.generate), derandomize=True)
@example((CLEAN_SHOTS, TWO, script((1, "cut"), (5, "cut"))))
@example((SHOTS, TWO, script((2, "cut"), (8, "cut"), (9, "causal"), chunks=12)))
@example((NEW_AVERAGES, TWO, script((5, "causal"), chunks=8)))
@example((CacheConfig(3, 2, "window"), ONE, script((5, "cut"), chunks=7)))
@given(videos())
def test_it_is_what_a_list_of_slots_makes(model, video):
    cache, sampling, chunks = video
    negative = prompt(model, 3) if sampling.guided else None
    size = dict(height=HEIGHT, width=WIDTH)
    with RollingSession(model, prompt(model), cache=cache, sampling=sampling, negative=negative, **size) as session:
        for words, switch, frames in chunks:
            session.set_prompt(prompt(model, words), negative, switch)
            if frames:
                session.prefill(seeded_noise(9, session.state.frames, (1, 16, frames, *LATENTS), 0))
            else:
                list(session.generate(1, seed=3))
    shape = CacheShape.of(model.transformer, 1, *LATENTS, torch.float32)
    naive, state = NaiveVideo(model, cache, sampling, shape, negative), session.state
    for record, latents in zip(state.records, state.chunks):
        words = state.prompts[record.prompt]
        if record.seed is None:
            naive.given(latents, words, record.switch)
            continue
        noise = chunk_noise(None, 3, naive.frames, latents.shape, torch.float32, torch.device("cpu"))
        expected = naive.sampled(record.frames, noise, words, record.switch)
        torch.testing.assert_close(latents, expected, atol=2e-5, rtol=0)
