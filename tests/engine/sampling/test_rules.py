"""Every rule of a cache with every operation on a video: cut into runs, forked, cancelled, taken over or replayed, it stays the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from videos import HEIGHT, SAMPLING, WIDTH, Cancelled, prompt, same, small_model

from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.config import ALL_FRAMES, SWITCHES, CacheConfig
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.workspace import Workspace

CHUNK = SAMPLING.chunk
RULES = {
    "absolute": CacheConfig(6, sink=2),
    "no sink": CacheConfig(5),
    "all frames": CacheConfig(ALL_FRAMES, sink=2),
    "all frames, window positions": CacheConfig(ALL_FRAMES, sink=1, positions="window"),
    "window positions": CacheConfig(6, sink=1, positions="window"),
    "a span": CacheConfig(6, sink=2, positions="window", span=9),
    "a deep sink": CacheConfig(8, sink=5, positions="window"),
    "a new sink at a switch": CacheConfig(6, sink=2, positions="window", switch="joint", global_sink=False),
    "causal switches": CacheConfig(7, sink=2, switch="causal"),
    "averaged into the sink": CacheConfig(6, sink=2, positions="window", leaving="ema", ema_alpha=0.5),
    "averaged, absolute": CacheConfig(6, sink=2, leaving="ema", ema_alpha=0.5, switch="joint", global_sink=False),
    "a memory": CacheConfig(7, sink=1, positions="window", leaving="memory", memory_alphas=(0.3, 0.8)),
    "shots": CacheConfig(8, sink=2, cut_flush=False, cut_offset=8, shot_sink=True),
    "shots, window positions": CacheConfig(8, sink=2, positions="window", cut_flush=False, shot_sink=True),
    "shots that do not fit": CacheConfig(7, sink=1, cut_flush=False, cut_offset=2.5, shot_sink=True),
    "clean shots": CacheConfig(8, sink=2, cut_flush=False, cut_offset=8, shot_sink=True, shot_clean=True),
    "clean shots, window positions": CacheConfig(8, 2, "window", cut_flush=False, shot_sink=True, shot_clean=True),
}


@pytest.fixture(scope="module")
def model():
    return small_model()


def switches_of(cache):
    """Those that the rules can do; None is the family's own."""
    return [None, *(s for s in SWITCHES if cache.leaving == "drop" or s not in ("flush", "cut"))]


@st.composite
def scripts(draw, cache, most=9):
    """What each chunk is made with: a prompt, and how to switch to it."""
    chunks = draw(st.integers(3, most))
    switch = st.sampled_from(switches_of(cache))
    return [(draw(st.integers(0, 2)), draw(st.one_of(st.none(), switch))) for _ in range(chunks)]


def run(model, cache, script, state=None, stop=None, **settings):
    """Make the chunks of a script in one session. stop: the pass at which it is cancelled, to go on in the same session."""
    passes = 0

    def on_pass(done, total):
        nonlocal passes
        assert 0 <= done < total
        passes += 1
        if passes == stop:
            raise Cancelled

    words, switch = script[0]
    session = RollingSession(
        model,
        prompt(model, words),
        height=HEIGHT,
        width=WIDTH,
        cache=cache,
        state=state,
        switch=switch,
        on_pass=on_pass,
        **settings,
    )
    with session:
        for words, switch in script:
            session.set_prompt(prompt(model, words), session_negative(model, settings), switch)
            try:
                list(session.generate(1, seed=3))
            except Cancelled:
                list(session.generate(1, seed=3))
    return session.state


def session_negative(model, settings):
    return prompt(model, 5) if "negative" in settings else None


@pytest.mark.parametrize("cache", RULES.values(), ids=RULES)
@settings(
    max_examples=6,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_video_is_the_same_however_it_is_made(model, cache, data):
    """Cut into runs that take over, that replay, or that find another video's cache; and cancelled somewhere."""
    script = data.draw(scripts(cache))
    whole = run(model, cache, script)
    workspace, state, rest = Workspace(), None, script
    while rest:
        count = data.draw(st.integers(1, len(rest)), label="chunks of a run")
        kind = data.draw(st.sampled_from(["take over", "replay", "another video in between"]))
        if kind == "another video in between":
            run(model, cache, [(1, None), (0, "hold")], workspace=workspace)
        stop = data.draw(st.one_of(st.none(), st.integers(1, 12)), label="cancelled at pass")
        state = run(model, cache, rest[:count], state, stop, workspace=None if kind == "replay" else workspace)
        rest = rest[count:]
    assert same(state, whole)


@pytest.mark.parametrize("cache", RULES.values(), ids=RULES)
def test_batches_guidance_and_offloading_change_nothing(model, cache):
    own = "cut" if cache.shot_sink else "flush" if cache.leaving == "drop" else "joint"
    script = [(0, None)] * 4 + [(1, own)] + [(1, None)] * 3 + [(2, "causal"), (2, None), (2, None)]
    whole = run(model, cache, script)
    assert same(run(model, replace(cache, offload=True), script), whole)
    pair = run(model, cache, script, batch=2)
    torch.testing.assert_close(pair.latents()[:1], whole.latents(), atol=1e-5, rtol=0)
    guided = dict(sampling=replace(SAMPLING, guidance_scale=2.0), negative=prompt(model, 5))
    full = run(model, cache, script, **guided)
    part = run(model, cache, script[:6], **guided)
    assert same(run(model, cache, script[6:], part, **guided), full)


@pytest.mark.parametrize("cache", RULES.values(), ids=RULES)
def test_what_is_announced_is_held(model, cache):
    """Bytes, while frames leave and after every kind of switch."""
    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, cache=cache)
    with session:
        for number in range(12):
            session.set_prompt(prompt(model, number % 2), switch=switches_of(cache)[number % len(switches_of(cache))])
            list(session.generate(1))
            (rolling,) = session._open.branches.caches.values()
            kept = RollingKVCache.bytes_kept(rolling.shape, cache, rolling.window.capacity)
            assert rolling.nbytes.device <= kept.device and rolling.nbytes.host <= kept.host
        session.set_prompt(prompt(model), switch="hold")
        list(session.generate(6))
        assert cache.unlimited or cache.shot_sink or rolling.nbytes == kept


def test_nothing_is_switched_at_the_start_nor_for_the_same_prompt(model):
    cache = replace(RULES["absolute"], switch="flush")
    state = run(model, cache, [(0, "cut"), (0, None), (1, None), (1, None), (1, "hold"), (2, "joint")])
    assert [record.switch for record in state.records] == ["", "", "flush", "", "", "joint"]


def test_a_switch_that_replaces_everything_is_not_preceded_by_a_replay(model):
    passes = []
    cache = RULES["a new sink at a switch"]
    state = run(model, cache, [(0, None)] * 6 + [(1, "joint"), (1, None)])
    session = RollingSession(
        model,
        prompt(model, 1),
        height=HEIGHT,
        width=WIDTH,
        cache=cache,
        state=state,
        on_pass=lambda *p: passes.append(p),
    )
    with session:
        list(session.generate(1, seed=3))
    # The switch, the two chunks made since, and the two steps of the new one.
    assert passes == [(n, 5) for n in range(5)]
    assert same(session.state, run(model, cache, [(0, None)] * 6 + [(1, "joint"), (1, None), (1, None)]))


@pytest.mark.parametrize("switch", ["flush", "cut"])
@pytest.mark.parametrize("leaving", ["ema", "memory"])
def test_averages_and_single_frames_do_not_go_together(model, leaving, switch):
    cache = next(rule for rule in RULES.values() if rule.leaving == leaving)
    with pytest.raises(ValueError, match=f'a "{switch}" at a prompt switch cannot go with leaving "{leaving}"'):
        run(model, cache, [(0, None), (1, switch)])


@pytest.mark.parametrize("given", [True, False], ids=["frames are given", "a chunk is made"])
@pytest.mark.parametrize("then", ["hold", "cut", "joint"])
@pytest.mark.parametrize("cancelled", ["hold", "cut", "joint"])
def test_a_cancelled_chunk_leaves_no_switch_behind(model, cancelled, then, given):
    """Neither in the session that goes on, nor where another takes over what it left."""
    settings = dict(height=HEIGHT, width=WIDTH, cache=RULES["window positions"])
    clip = torch.zeros(1, 16, CHUNK, HEIGHT // 8, WIDTH // 8)
    words = prompt(model, 1), prompt(model, 2)

    def go_on(session):
        session.set_prompt(words[1], switch=then)
        if given:
            session.prefill(clip)
        list(session.generate(1, seed=3))
        return session.state

    def on_pass(done, total):
        if session.state.frames == 4 * CHUNK and done == total - 1:
            raise Cancelled

    start = run(model, settings["cache"], [(0, None)] * 4)
    with RollingSession(model, words[1], state=start, switch="hold", **settings) as session:
        expected = go_on(session)
    for taken_over in (False, True):
        workspace = Workspace()
        session = RollingSession(model, words[0], state=start, switch=cancelled, workspace=workspace, **settings)
        session.on_pass = on_pass
        with session:
            with pytest.raises(Cancelled):
                list(session.generate(1, seed=3))
            session.on_pass = None
            made = None if taken_over else go_on(session)
        if taken_over:
            with RollingSession(model, words[1], state=start, workspace=workspace, **settings) as session:
                made = go_on(session)
        assert same(made, expected)
