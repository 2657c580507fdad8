"""Prompts that are blended into each other, chunk by chunk."""

import pytest
import torch
from stand_in_vae import StandInVae
from videos import HEIGHT, SAMPLING, WIDTH, WINDOW, prompt, same, sample, small_model

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.sampling.blend import CURVES, blend_prompts
from rolling_kv.sampling.session import RollingSession

RULES = {
    "kept": WINDOW,
    "joint at a switch": CacheConfig(6, sink=2, switch="joint"),
    "flush at a switch": CacheConfig(6, sink=1, positions="window", switch="flush"),
    "averaged": CacheConfig(6, sink=2, leaving="ema"),
    "recomputed": CacheConfig(4, context="recomputed"),
}
JOINT = dict(
    sampling=SamplingConfig(chunk=2, sampler="rolling", denoising_steps=(1000, 500)), cache=CacheConfig(7, sink=2)
)


@pytest.fixture(scope="module")
def model():
    return small_model()


def blended(model, chunks, blend, after=2, **settings):
    """The state of a session that changes to prompt 1 after some chunks."""
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, vae=StandInVae(), **settings) as session:
        list(session.generate(after, seed=7))
        session.set_prompt(prompt(model, 1), blend=blend)
        list(session.generate(chunks - after, seed=7))
    return session.state


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blend_begins_with_the_old_and_ends_with_the_new(curve, dtype):
    old, new = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2))
    made = blend_prompts(old, new, 4, curve)
    assert len(made) == 4 and torch.equal(made[0], old) and torch.equal(made[-1], new)
    assert all(embeds.dtype == dtype for embeds in made)
    distances = [(embeds - new).float().norm() for embeds in made]
    assert distances == sorted(distances, reverse=True)


def test_a_linear_blend_is_kreas():
    old, new = (torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    expected = [torch.lerp(old, new, share) for share in torch.linspace(0, 1, 7)]
    assert all(map(torch.equal, blend_prompts(old, new, 7), expected))


def test_tokens_keep_their_length_on_an_arc():
    old, new = (torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    old, new = (embeds / embeds.norm(dim=-1, keepdim=True) for embeds in (old, new))
    for embeds in blend_prompts(old, new, 6, "slerp"):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(1, 5))
    assert blend_prompts(old, new, 3)[1].norm(dim=-1).max() < 0.99


@pytest.mark.parametrize("new", [0.0, -1.0, 2.0], ids=["nothing", "opposite", "parallel"])
def test_an_arc_that_is_none_is_a_line(new):
    old = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    made = blend_prompts(old, new * old, 4, "slerp")
    assert all(torch.allclose(*pair) for pair in zip(made, blend_prompts(old, new * old, 4)))


@pytest.mark.parametrize("tokens", [(3, 5), (5, 3)])
def test_the_shorter_prompt_is_padded(tokens):
    old, new = (torch.ones(1, length, 8) for length in tokens)
    middle = blend_prompts(old, new, 3)[1]
    assert middle.shape == (1, 5, 8)
    assert middle[0, :, 0].tolist() == [1, 1, 1, 0.5, 0.5]


def test_over_one_chunk_there_is_nothing_between():
    assert [embeds.item() for embeds in blend_prompts(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), 1)] == [1]


def test_an_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="the curve of a blend must be one of linear, slerp, got 'cubic'"):
        blend_prompts(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 3, "cubic")


@pytest.mark.parametrize("cache", RULES.values(), ids=RULES)
def test_the_log_has_every_mixture_and_no_switch(model, cache):
    state = blended(model, 7, 4, cache=cache)
    mixed = blend_prompts(prompt(model), prompt(model, 1), 4)
    assert [record.prompt for record in state.records] == [0, 0, 0, 1, 2, 3, 3]
    assert all(map(torch.equal, state.prompts, mixed)) and len(state.prompts) == 4
    assert {record.switch for record in state.records} == {""}


@pytest.mark.parametrize("cache", RULES.values(), ids=RULES)
def test_a_blend_can_be_cut_into_runs(model, cache):
    """Each run asks for one mixture, as a schedule of prompts does."""
    state = sample(model, 2, cache=cache, vae=StandInVae())
    for embeds in blend_prompts(prompt(model), prompt(model, 1), 3):
        with RollingSession(
            model, embeds, height=HEIGHT, width=WIDTH, cache=cache, state=state, switch="hold", vae=StandInVae()
        ) as session:
            list(session.generate(1, seed=7))
        state = session.state
    assert same(state, blended(model, 5, 3, cache=cache))


def test_a_state_is_blended_from(model):
    """Whatever prompt the session was opened with, if no chunk was made with it."""
    with RollingSession(model, prompt(model, 1), height=HEIGHT, width=WIDTH, state=sample(model, 2)) as session:
        session.set_prompt(prompt(model, 1), blend=3)
        list(session.generate(4, seed=7))
    assert same(session.state, blended(model, 6, 3))


def test_a_video_that_has_not_begun_is_blended_from_the_first_prompt(model):
    state = blended(model, 3, 2, after=0)
    assert [record.prompt for record in state.records] == [0, 1, 1] and torch.equal(state.prompts[0], prompt(model))


def test_a_change_during_a_blend_starts_from_what_there_is(model):
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        list(session.generate(1))
        session.set_prompt(prompt(model, 1), blend=3)
        list(session.generate(2))
        session.set_prompt(prompt(model, 2), blend=2)
        list(session.generate(3))
    first = blend_prompts(prompt(model), prompt(model, 1), 3)
    assert all(map(torch.equal, session.state.prompts, [*first[:2], prompt(model, 2)]))
    assert [record.prompt for record in session.state.records] == [0, 0, 1, 1, 2, 2]


def test_a_change_without_a_blend_ends_one_and_is_a_switch_again(model):
    cache = RULES["joint at a switch"]
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, cache=cache) as session:
        list(session.generate(1))
        session.set_prompt(prompt(model, 1), blend=3)
        list(session.generate(2))
        session.set_prompt(prompt(model, 2))
        list(session.generate(2))
    assert [record.switch for record in session.state.records] == ["", "", "", "joint", ""]


def test_a_blend_that_begins_during_a_chunk_starts_from_its_prompt(model):
    def change(done, total):
        if done == 3:  # behind the replay, inside the first chunk, which is the first to have prompt 1
            session.set_prompt(prompt(model, 2), blend=3)

    start = sample(model, 2)
    with RollingSession(model, prompt(model, 1), height=HEIGHT, width=WIDTH, state=start, on_pass=change) as session:
        list(session.generate(3))
    mixed = blend_prompts(prompt(model, 1), prompt(model, 2), 3)
    assert [record.prompt for record in session.state.records] == [0, 0, 1, 1, 2]
    assert all(map(torch.equal, session.state.prompts[1:], mixed))


def test_a_blend_waits_while_frames_are_given(model):
    frames = torch.zeros(1, 16, 4, HEIGHT // 8, WIDTH // 8)
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        list(session.generate(1))
        session.set_prompt(prompt(model, 1), blend=3)
        session.prefill(frames)
        list(session.generate(1))
        session.prefill(frames[:, :, :2])
        list(session.generate(2))
    assert [record.prompt for record in session.state.records] == [0, 0, 0, 0, 1, 1, 2]


def test_a_cancelled_chunk_keeps_its_mixture(model):
    def cancel(done, total):
        if done == 7:
            session.on_pass = None
            raise KeyboardInterrupt

    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        list(session.generate(2, seed=7))
        session.set_prompt(prompt(model, 1), blend=3)
        session.on_pass = cancel
        with pytest.raises(KeyboardInterrupt):
            list(session.generate(4, seed=7))
        list(session.generate(6 - len(session.state.records), seed=7))
    assert same(session.state, blended(model, 6, 3))


def test_the_negative_prompt_changes_at_once(model):
    guided = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=2.0)
    with RollingSession(
        model, prompt(model), negative=prompt(model, 5), height=HEIGHT, width=WIDTH, sampling=guided
    ) as session:
        list(session.generate(1))
        session.set_prompt(prompt(model, 1), prompt(model, 6), blend=2)
        list(session.generate(2))
    prompts = session.state.prompts
    assert [torch.equal(prompts[record.negative], prompt(model, 6)) for record in session.state.records] == [0, 1, 1]


def test_joint_passes_blend_from_chunk_to_chunk(model):
    state = blended(model, 8, 3, after=3, **JOINT)
    assert [record.prompt for record in state.records] == [0, 0, 0, 0, 1, 2, 2, 2]
    mixed = blend_prompts(prompt(model), prompt(model, 1), 3)
    assert all(map(torch.equal, state.prompts, mixed))


@pytest.mark.parametrize("switch", ["joint", "causal", "flush", "cut"])
def test_a_blend_is_no_switch(model, switch):
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        with pytest.raises(ValueError, match=f'a blend over 3 chunks changes .* where a "{switch}" has no place'):
            session.set_prompt(prompt(model, 1), switch=switch, blend=3)
        session.set_prompt(prompt(model, 1), switch=switch, blend=1)
        session.set_prompt(prompt(model, 1), switch="hold", blend=3)


@pytest.mark.parametrize("blend, message", [(0, "must be at least 1 chunk, got 0"), (2.5, "a whole number, got 2.5")])
def test_a_blend_has_whole_chunks(model, blend, message):
    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, sampling=SAMPLING)
    with pytest.raises(ValueError, match=f"blend {message}|blend must be {message}"):
        session.set_prompt(prompt(model, 1), blend=blend)
