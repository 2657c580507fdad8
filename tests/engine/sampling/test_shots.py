"""A prompt that begins a shot: it is that of the shot's first chunk, and the chunks after it have another."""

import pytest
import torch
from videos import HEIGHT, SAMPLING, WIDTH, prompt, same, sample, small_model

from rolling_kv.config import CacheConfig
from rolling_kv.sampling.session import RollingSession

SHOTS = CacheConfig(8, sink=2, cut_flush=False, cut_offset=8, shot_sink=True)


@pytest.fixture(scope="module")
def model():
    return small_model()


def begin_shot(model, state, chunks, **settings):
    """Three chunks more: a cut with the prompt 1, then the prompt 2."""
    session = RollingSession(
        model, prompt(model, 1), after=prompt(model, 2), switch="cut", state=state, cache=SHOTS, height=HEIGHT,
        width=WIDTH, **settings,
    )  # fmt: skip
    with session:
        for _ in session.generate(chunks, seed=7):
            pass
    return session.state


def test_the_first_chunk_has_the_prompt_that_begins_it(model):
    before = sample(model, 2, cache=SHOTS)
    state = begin_shot(model, before, 3)
    assert [(record.prompt, record.switch) for record in state.records[2:]] == [(1, "cut"), (2, ""), (2, "")]
    assert all(torch.equal(state.prompts[words], prompt(model, words)) for words in (1, 2))
    with RollingSession(model, prompt(model), cache=SHOTS, height=HEIGHT, width=WIDTH) as session:
        for number in range(5):
            if number in (2, 3):
                session.set_prompt(prompt(model, number - 1), switch="cut" if number == 2 else None)
            list(session.generate(1, seed=7))
    assert same(session.state, state)


def test_it_goes_on_in_another_run(model):
    before = sample(model, 2, cache=SHOTS)
    whole, first = begin_shot(model, before, 3), begin_shot(model, before, 1)
    assert same(sample(model, 2, words=2, state=first, cache=SHOTS), whole)


def test_at_the_start_there_is_no_cut(model):
    state = begin_shot(model, None, 2)
    assert [(record.prompt, record.switch) for record in state.records] == [(0, ""), (1, "")]


def test_another_prompt_takes_its_place(model):
    session = RollingSession(
        model, prompt(model), after=prompt(model, 1), sampling=SAMPLING, cache=SHOTS, height=HEIGHT, width=WIDTH
    )
    with session:
        for _ in session.generate(2, seed=7):
            session.set_prompt(prompt(model, 3))
    assert torch.equal(session.state.prompts[1], prompt(model, 3))
