"""A context that is computed anew before every chunk: the same video however it is cut, cancelled, batched or kept."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_vae import StandInVae
from videos import HEIGHT, SAMPLING, WIDTH, Cancelled, prompt, same, sample, small_model

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.presets import PRESETS
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.recomputed import needs_vae
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState, ChunkRecord
from rolling_kv.sampling.workspace import Workspace

CACHE = CacheConfig(4, context="recomputed")
"""A chunk of 2 sees 2 frames beside its own: from the third chunk on, the first of them has been encoded again."""
LONG = replace(CACHE, window=6)
FIRST = replace(LONG, sink=1)
GUIDED = dict(sampling=replace(SAMPLING, guidance_scale=2.0))
WAYS = {
    "": dict(cache=CACHE),
    "two chunks in view": dict(cache=LONG),
    "first frame kept": dict(cache=FIRST),
    "guided": dict(cache=CACHE, **GUIDED),
    "frame by frame": dict(cache=CACHE, sampling=replace(SAMPLING, chunk=1)),
    "first frame alone": dict(cache=LONG, sampling=replace(SAMPLING, independent_first_frame=True)),
    "window positions": dict(cache=replace(LONG, positions="window")),
    "int8": dict(cache=replace(CACHE, storage="int8")),
    "offloaded": dict(cache=replace(LONG, offload=True)),
    "noisy context": dict(cache=CACHE, sampling=replace(SAMPLING, context_noise=200.0)),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def model():
    return small_model()


def make(model, chunks, **arguments):
    if "sampling" in arguments and arguments["sampling"].guided:
        arguments = {"negative": prompt(model, 5, arguments.get("batch", 1))} | arguments
    return sample(model, chunks, **{"cache": CACHE, "vae": StandInVae()} | arguments)


def another_day(state):
    """The state as it comes back from a file, and nothing else of it."""
    records = [tuple(record) for record in state.records]
    chunks, prompts = ([tensor.clone() for tensor in tensors] for tensors in (state.chunks, state.prompts))
    return CacheState(
        tuple(chunks), tuple(prompts), tuple(ChunkRecord(*record) for record in records), state.model, state.key
    )


@ways
def test_runs_equal_one(model, way):
    whole = make(model, 6, **way)
    state, workspace = None, Workspace()
    for chunks in (1, 2, 1, 2):
        state = make(model, chunks, state=state and another_day(state), workspace=workspace, **way)
    assert same(state, whole)


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4), data=st.data())
def test_any_cut_gives_the_same_bits(model, cuts, data):
    workspace, state = Workspace(), None
    for chunks in cuts:
        if data.draw(st.booleans(), label="another video in between"):
            make(model, 2, seed=99, workspace=workspace)
        state = make(model, chunks, state=state, workspace=workspace)
    assert same(state, make(model, sum(cuts)))


def test_forks_do_not_disturb_each_other(model):
    workspace = Workspace()
    trunk = make(model, 3, workspace=workspace)
    for words in (1, 2):
        fork = make(model, 2, words=words, state=trunk, workspace=workspace)
        assert same(fork, make(model, 2, words=words, state=another_day(trunk)))


@ways
def test_a_session_goes_on_after_a_cancel_at_any_pass(model, way):
    counted = []
    whole = make(model, 4, on_pass=lambda *pair: counted.append(pair), **way)
    assert counted == [(done, len(counted)) for done in range(len(counted))]
    for at in range(0, len(counted), 2):

        def cancel(done, total, at=at):
            if done == at:
                session.on_pass = None
                raise Cancelled

        negative = dict(negative=prompt(model, 5)) if "sampling" in way and way["sampling"].guided else {}
        session = RollingSession(
            model, prompt(model), height=HEIGHT, width=WIDTH, vae=StandInVae(), on_pass=cancel, **negative, **way
        )
        with session:
            with pytest.raises(Cancelled):
                list(session.generate(4, seed=7))
            list(session.generate(4 - len(session.state.records), seed=7))
        assert same(session.state, whole)


@ways
def test_progress_is_exact_where_a_video_is_continued(model, way):
    state, counted = make(model, 3, **way), []
    make(model, 3, state=state, on_pass=lambda *pair: counted.append(pair), **way)
    assert counted == [(done, len(counted)) for done in range(len(counted))]


def test_what_a_chunk_costs(model):
    """A pass for every chunk in view, and its steps: nothing else, however long the video is."""
    counted, steps = [], len(SAMPLING.denoising_steps)
    make(model, 5, cache=LONG, on_pass=lambda *pair: counted.append(pair))
    assert len(counted) == 5 * steps + 0 + 1 + 2 + 2 + 2


@pytest.mark.parametrize("way", [WAYS[""], WAYS["guided"], WAYS["first frame kept"]])
def test_each_sample_of_a_batch_is_its_own_video(model, way):
    both, alone = make(model, 4, batch=2, **way).latents(), make(model, 4, **way).latents()
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_offloading_changes_nothing(model):
    assert same(make(model, 5, cache=LONG), make(model, 5, cache=replace(LONG, offload=True)))


def test_every_rule_makes_another_video(model):
    made = [make(model, 5, cache=cache) for cache in (CACHE, LONG, FIRST, replace(LONG, context="kept"))]
    assert len({state.key for state in made}) == len(made)


def test_frames_can_be_given_at_any_time(model):
    """The context is made of whatever frames there are; one that was given can be encoded again too."""
    frames = torch.randn(1, 16, 3, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    size = dict(height=HEIGHT, width=WIDTH, cache=CACHE, vae=StandInVae())
    with RollingSession(model, prompt(model), **size) as session:
        list(session.generate(2, seed=7))
        session.prefill(frames)
        list(session.generate(4, seed=7))
    with RollingSession(model, prompt(model), state=make(model, 2), **size) as given:
        given.prefill(frames)
        list(given.generate(1, seed=7))
    assert same(make(model, 3, state=given.state), session.state)
    assert [record.seed is None for record in session.state.records] == [False] * 2 + [True] * 2 + [False] * 4


def test_the_context_is_seen_under_the_prompt_before(model):
    """So a prompt that changes twice at once was never there, and one that has been there shows one chunk later still."""
    trunk = make(model, 2)
    changed = make(model, 1, words=1, state=trunk)
    assert same(make(model, 1, words=1, state=another_day(trunk)), changed)
    swapped = trunk._replace(prompts=(prompt(model, 3),))
    assert not torch.equal(make(model, 1, words=1, state=swapped).chunks[-1], changed.chunks[-1])


def test_the_video_is_decoded_once(model):
    vae = StandInVae()
    state = make(model, 6, vae=vae)
    assert vae.seen == [12 - 2 - 1]  # up to the frame before the context of the last chunk
    make(model, 2, state=state, vae=vae)
    assert vae.seen == [9, 14 - 2 + 1]


def test_no_vae_is_asked_where_the_first_frame_stays(model):
    vae = StandInVae()
    make(model, 5, cache=FIRST, vae=vae)
    make(model, 2, cache=CACHE, vae=vae)
    assert not vae.seen
    assert same(make(model, 5, cache=FIRST, vae=None), make(model, 5, cache=FIRST))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_missing_vae_is_named_before_any_pass(model, before):
    passes = []
    state = make(model, before, vae=None) if before else None
    make(model, 2 - before, state=state, vae=None)
    with pytest.raises(ValueError, match=r'from latent frame 4 on.*needs a VAE: give one, .* context "kept"'):
        make(model, 3 - before, state=state, vae=None, on_pass=lambda *pair: passes.append(pair))
    assert not passes
    start = state or CacheState()
    assert [needs_vae(CACHE, SAMPLING, start, chunks) for chunks in (0, 2 - before, 3 - before)] == [False, False, True]
    assert not needs_vae(replace(CACHE, context="kept"), SAMPLING, start, 9)


def test_a_vae_that_fails_is_begun_anew(model):
    class Unlucky(StandInVae):
        def reencoder(self):
            stream, first = super().reencoder(), not self.seen[1:]

            def reencode(latents):
                made = stream(latents)
                if first and self.seen[0] > 4:
                    raise MemoryError
                return made

            return reencode

    size = dict(height=HEIGHT, width=WIDTH, cache=CACHE, vae=Unlucky())
    with RollingSession(model, prompt(model), **size) as session:
        with pytest.raises(MemoryError):
            list(session.generate(6, seed=7))
        list(session.generate(6 - len(session.state.records), seed=7))
    assert same(session.state, make(model, 6))


def test_a_closed_session_holds_no_stream(model):
    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, cache=CACHE, vae=StandInVae())
    with session:
        list(session.generate(4))
        reencoded = session._open.history.reencoded
        assert reencoded._stream and reencoded._last is not None
    assert reencoded._stream is reencoded._last is None


def test_the_working_cache_is_as_large_as_announced(model):
    workspace = Workspace()
    state = make(model, 5, cache=LONG, workspace=workspace)
    announced = estimate(
        model.transformer, HEIGHT, WIDTH, sampling=SAMPLING, cache=LONG, frames=state.frames, prompt_tokens=0
    )
    assert workspace.nbytes == announced.cache


def test_a_video_may_change_its_rules(model):
    """From kept keys to a recomputed context and back, cuts and all: each finds in the log what it needs."""
    kept = CacheConfig(6, sink=2)
    states = []
    for workspace in (Workspace(), None):
        state = None
        for step in (dict(cache=kept), dict(cache=kept, words=1, switch="cut"), dict(), dict(cache=kept), dict()):
            state = make(model, 2, state=state, workspace=workspace, **step)
        states.append(state)
    assert same(*states)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window="all"), "needs a window: all frames would all be computed anew"),
        (dict(sink=2), "make the sink 0 or 1, not 2"),
        (dict(leaving="ema", sink=1), 'keeps no keys that leaving "ema" could average'),
        (dict(leaving="memory", positions="window"), 'keeps no keys that leaving "memory" could average'),
        *((dict(switch=switch), f'a "{switch}" at a prompt switch cannot') for switch in ("joint", "causal", "cut")),
    ],
)
def test_rules_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CACHE, **changes)


@pytest.mark.parametrize(
    "chunk, window, nearest",
    [
        (3, 8, "6 and 9"),
        (3, 3, "6 and 9"),
        (2, 5, "4 and 6"),
        (2, 2, "4 and 6"),
        (1, 2, "3 and 4"),
        (4, 30, "28 and 32"),
    ],
)
def test_a_window_must_hold_whole_chunks(chunk, window, nearest):
    with pytest.raises(ValueError, match=f"window of {window} does not: the nearest windows are {nearest}$"):
        replace(CACHE, window=window).check_chunk(chunk)
    for works in nearest.split(" and "):
        replace(CACHE, window=int(works)).check_chunk(chunk)


@pytest.mark.parametrize("switch", ["joint", "causal", "flush", "cut"])
def test_prompts_are_not_switched(model, switch):
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, cache=CACHE) as session:
        with pytest.raises(
            ValueError, match=f'a "{switch}" at a prompt switch cannot go with the context "recomputed"'
        ):
            session.set_prompt(prompt(model, 1), switch=switch)


def test_kreas_preset_is_sound():
    preset = PRESETS["krea-realtime"]
    preset.sampling.check_cache(preset.cache)
    assert not needs_vae(preset.cache, preset.sampling, CacheState(), 2)
    assert needs_vae(preset.cache, preset.sampling, CacheState(), 3)
    assert preset.sampling.denoising_steps == tuple(torch.linspace(1000, 0, 5).int().tolist())
    assert SamplingConfig.passes_for(preset.sampling, 1) == 5
