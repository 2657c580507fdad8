"""One given frame inside the first chunk: it stays clean while the others are made, and the log tells of it."""

from dataclasses import replace

import pytest
import torch
from videos import HEIGHT, SAMPLING, WIDTH, Cancelled, prompt, same, sample, small_model

from rolling_kv.config import SamplingConfig
from rolling_kv.sampling.schedule import seeded_noise
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.workspace import Workspace

INSIDE = replace(SAMPLING, given_frame="in chunk")
SAMPLERS = {
    "renoise": INSIDE,
    "unipc": replace(INSIDE, sampler="unipc", num_inference_steps=3),
    "guided": replace(INSIDE, sampler="unipc", num_inference_steps=3, guidance_scale=2.0),
}
PICTURE = seeded_noise(3, 0, (1, 16, 1, HEIGHT // 8, WIDTH // 8), 0)


@pytest.fixture(scope="module")
def model():
    return small_model()


def start(model, chunks, *, given=PICTURE, sampling=INSIDE, **settings):
    negative = prompt(model, 5) if sampling.guided else None
    session = RollingSession(
        model, prompt(model), negative=negative, height=HEIGHT, width=WIDTH, sampling=sampling, **settings
    )
    with session:
        session.prefill(given)
        for _ in session.generate(chunks, seed=7):
            pass
    return session.state


@pytest.mark.parametrize("sampling", SAMPLERS.values(), ids=SAMPLERS)
def test_the_first_chunk_begins_with_it(sampling, model):
    state = start(model, 2, sampling=sampling)
    assert [(record.frames, record.given, record.seed) for record in state.records] == [(2, 1, 7), (2, 0, 7)]
    assert torch.equal(state.latents()[:, :, :1], PICTURE)
    other = start(model, 2, given=-PICTURE, sampling=sampling)
    assert not torch.equal(state.latents()[:, :, 1:], other.latents()[:, :, 1:]) and state.key != other.key


def test_the_other_frames_see_it_clean_in_every_pass(model, monkeypatch):
    passes = []
    forward = type(model.transformer).forward

    def noted(self, hidden_states, timestep, *args, **kwargs):
        passes.append((hidden_states[:, :, :1].clone(), timestep.tolist()))
        return forward(self, hidden_states, timestep, *args, **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", noted)
    start(model, 1)
    assert len(passes) == 2 and all(torch.equal(first, PICTURE) for first, _ in passes)
    assert all(0.0 in torch.tensor(times).flatten() for _, times in passes)


@pytest.mark.parametrize("sampling", SAMPLERS.values(), ids=SAMPLERS)
def test_splits_forks_and_replays_give_the_same_bits(sampling, model):
    whole, workspace = start(model, 4, sampling=sampling), Workspace()
    negative = prompt(model, 5) if sampling.guided else None
    first = start(model, 1, sampling=sampling, workspace=workspace)
    for place in (workspace, Workspace(), None):
        assert same(sample(model, 3, state=first, sampling=sampling, negative=negative, workspace=place), whole)


def test_a_cancelled_first_chunk_begins_with_it_again(model):
    def cancel(done, total):
        if done == 1 and not cancelled:
            cancelled.append(True)
            raise Cancelled

    cancelled = []
    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, sampling=INSIDE, on_pass=cancel)
    with session:
        session.prefill(PICTURE)
        with pytest.raises(Cancelled):
            list(session.generate(1, seed=7))
        list(session.generate(2, seed=7))
    assert cancelled and same(session.state, start(model, 2))


def test_more_frames_are_a_video_to_extend(model):
    video = seeded_noise(4, 0, (1, 16, 3, *PICTURE.shape[3:]), 0)
    state = start(model, 1, given=video)
    assert [(record.frames, record.given, record.seed) for record in state.records] == [
        (1, 0, None),
        (2, 0, None),
        (2, 0, 7),
    ]
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, sampling=INSIDE) as session:
        session.prefill(video[:, :, :1])
        session.prefill(video[:, :, 1:])
        list(session.generate(1, seed=7))
    assert same(session.state, state)


def test_a_chunk_of_its_own_where_the_family_has_it_so(model):
    for sampling in (SAMPLING, replace(INSIDE, independent_first_frame=True)):
        state = start(model, 1, sampling=sampling)
        assert [(record.frames, record.given) for record in state.records] == [(1, 0), (2, 0)]
        assert torch.equal(state.latents()[:, :, :1], PICTURE)


def test_it_is_a_choice():
    with pytest.raises(ValueError, match="given_frame must be one of own chunk, in chunk, got 'first'"):
        SamplingConfig(given_frame="first")
    assert INSIDE.given_inside(1) and not any(
        (INSIDE.given_inside(2), INSIDE.given_inside(1, 2), SAMPLING.given_inside(1))
    )
