"""Rolling-Forcing's sampler: its schedule, what its passes see, and a session with it, whatever happens on the way."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from builders import tiny_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import HEIGHT, WIDTH, Cancelled, prompt, same

from rolling_kv.bench.gauges import TensorBytes
from rolling_kv.cache.codecs import CODECS
from rolling_kv.cache.joint import JointKVCache, JointPass
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CACHE_STORAGES, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.rope import rotary_angles, rotate, rotations
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.rolling import joint_windows, rolling_chunks
from rolling_kv.sampling.schedule import renoise_chunk, seeded_noise, warp_steps
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.workspace import Workspace
from rolling_kv.step_cache import FirstBlockCache

STEPS = 3
SAMPLING = SamplingConfig(chunk=2, sampler="rolling", denoising_steps=(1000, 750, 500), context_noise=100.0)
CACHE = CacheConfig(9, sink=2)
"""The reach of a full pass of 3 chunks: the anchor, one frame, the pass."""


@pytest.fixture(scope="module")
def model():
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24)
    return CausalModel(transformer, ModelPreset("test", SAMPLING, CACHE))


def session(model, words=0, **options):
    return RollingSession(model, prompt(model, words), height=HEIGHT, width=WIDTH, **options)


def sample(model, *runs, seed=7, **options):
    """The state after runs of so many chunks each, in one session."""
    with session(model, **options) as opened:
        for chunks in runs:
            list(opened.generate(chunks, seed=seed))
    return opened.state


# The schedule.


@given(chunks=st.integers(1, 30), steps=st.integers(1, 9))
def test_every_chunk_takes_every_step_once_and_in_order(chunks, steps):
    taken = defaultdict(list)
    for number, window in enumerate(joint_windows(chunks, steps)):
        assert 0 < len(window) <= min(chunks, steps)
        for chunk in window:
            taken[chunk].append(number - chunk)
    assert taken == {chunk: list(range(steps)) for chunk in range(chunks)}


def test_a_chunk_alone_would_be_made_by_renoising():
    """A model without attention between the chunks: each is what `renoise_chunk` makes of the same draws."""
    steps, shape, chunks = warp_steps((1000, 750, 500, 250), 5.0), (1, 16, 2, 4, 6), 6

    def flow(x, timestep):
        return (x * (1 + timestep / 1000)).sin()

    def joint(x, timesteps):
        return torch.cat([flow(frame, time) for frame, time in zip(x.split(1, dim=2), timesteps)], dim=2)

    def noise(chunk):
        return lambda draw: seeded_noise(1, 2 * chunk, shape, draw)

    made = list(rolling_chunks(joint, noise, steps, chunks))
    for chunk, clean in enumerate(made):
        assert torch.equal(clean, renoise_chunk(flow, noise(chunk), steps))
    assert len(made) == chunks


def test_draw_n_of_a_chunk_is_the_noise_after_its_step_before(model):
    """So a caller's draw n of chunk b is what the original draws for it after pass b + n - 1."""
    asked = []

    def source(start, draw, shape):
        asked.append((start, draw))
        return seeded_noise(7, start, shape, draw)

    with session(model) as opened:
        made = [chunk.start_frame for chunk in opened.generate(5, seed=7, noise_source=source)]
    assert made == [0, 2, 4, 6, 8]
    assert sorted(asked) == [(2 * chunk, draw) for chunk in range(5) for draw in range(STEPS)]
    by_pass = [(start // 2 + draw - 1, start // 2) for start, draw in asked if draw]
    assert by_pass == sorted(by_pass)
    assert same(opened.state, sample(model, 5))


# What the passes see.


class NaiveFrames:
    """Every clean frame's key before RoPE and value, in lists; what each pass should see, frame by frame."""

    def __init__(self, shape, config):
        self.shape, self.config, self.clean = shape, config, []
        self.codec = CODECS[config.storage](shape.dtype)

    def angles(self, position):
        return rotary_angles(self.shape.head_dim, position, 1, 1, self.shape.tokens_per_frame)

    def rotated(self, key, position):
        return rotate(key, rotations(self.angles(position))[None, :, None])

    def kept(self, x):
        return self.codec.unpack(self.codec.pack(x))

    def joint(self, frames):
        """(keys, values) before those of the pass itself."""
        start = len(self.clean)
        anchor = min(self.config.sink, start)
        working = max(0, min(self.config.window - anchor - frames, start - anchor))
        positions = [start - working - anchor + i for i in range(anchor)] + list(range(start - working, start))
        which = list(range(anchor)) + list(range(start - working, start))
        return self._of(which, positions)

    def clean_pass(self):
        """(keys, values), its own included."""
        seen = list(range(len(self.clean)))[-self.config.window :]
        return self._of(seen, seen)

    def _of(self, which, positions):
        """Keys as they are kept, at their frame's place, and from there brought to the positions."""
        turns = [rotations(self.angles(to) - self.angles(i))[None, :, None] for i, to in zip(which, positions)]
        keys = [rotate(self.kept(self.rotated(self.clean[i][0], i)), turn) for i, turn in zip(which, turns)]
        return keys, [self.kept(self.clean[i][1]) for i in which]


def sorted_tokens(keys, values):
    """Attention does not ask for an order: tokens by their values."""
    order = (values.double().flatten(2) * torch.arange(2.0, 2 + values.shape[-1]).double().log()).sum(-1)[0].argsort()
    return keys[:, order], values[:, order]


@pytest.mark.parametrize("storage", CACHE_STORAGES)
@pytest.mark.parametrize("offload", [False, True])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_passes_see_the_frames_of_the_definition_where_they_belong(storage, offload, data):
    chunk, sink = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
    reach = sink + chunk + data.draw(st.integers(0, 9))
    joint = [chunk * data.draw(st.integers(1, 5)) for _ in range(data.draw(st.integers(1, 9)))]
    shape = CacheShape(2, 1, 2, 1, 24, torch.float32)
    config = CacheConfig(reach, sink, storage=storage, offload=offload)
    cache, naive = JointKVCache(shape, config, "cpu"), NaiveFrames(shape, config)
    generator = torch.Generator().manual_seed(0)

    def fresh(frames):
        return [torch.randn(2, 1, 2, 1, 24, generator=generator).unbind(0) for _ in range(frames)]

    def compare(seen, keys, values):
        expected = torch.cat(keys, 1), torch.cat(values, 1)
        assert seen[0].shape == expected[0].shape
        for ours, theirs in zip(sorted_tokens(*seen), sorted_tokens(*expected)):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    for frames in joint:
        start = len(naive.clean)
        ahead, own = JointPass(cache, frames), fresh(frames)
        own_keys = [naive.rotated(key, start + i) for i, (key, _) in enumerate(own)]
        own_values = [value for _, value in own]
        keys, values = naive.joint(frames)
        for layer in range(shape.layers):
            seen = ahead.update(layer, torch.cat(own_keys, 1), torch.cat(own_values, 1))
            compare(seen, [*keys, *own_keys], [*values, *own_values])
        made = fresh(chunk)
        naive.clean += made
        cache.begin(chunk)
        mine = [naive.rotated(key, start + i) for i, (key, _) in enumerate(made)]
        for layer in range(shape.layers):
            seen = cache.update(layer, torch.cat(mine, 1), torch.cat([value for _, value in made], 1))
            compare(seen, *naive.clean_pass())
        cache.commit()


# A session.


def test_a_chunk_is_there_as_soon_as_it_has_taken_its_last_step(model):
    """Progress counts the joint passes and the clean passes between them; the last chunk's waits for what follows."""
    counted, done = [], []
    with session(model, on_pass=lambda *pair: counted.append(pair)) as opened:
        for chunk in opened.generate(5, seed=7):
            done.append(len(counted))
            assert opened.state.frames == chunk.start_frame + 2
            assert torch.equal(opened.state.chunks[-1], chunk.latents)
        assert done == [STEPS, STEPS + 2, STEPS + 4, STEPS + 6, STEPS + 8]
        assert counted == [(number, STEPS + 8) for number in range(STEPS + 8)]
        assert opened.passes_needed(4) == STEPS + 8 + 1 + STEPS + 6
        list(opened.generate(4, seed=7))
    assert counted[-1] == (STEPS + 8 + STEPS + 6, STEPS + 8 + 1 + STEPS + 6)


def test_a_replay_and_a_cache_that_is_taken_over_go_on_alike(model):
    workspace, passes = Workspace(), []
    trunk = sample(model, 4, workspace=workspace)
    straight = sample(model, 4, 5)
    taken = sample(model, 5, state=trunk, workspace=workspace, on_pass=lambda *pair: passes.append(pair))
    assert len(passes) == 1 + (STEPS + 4) + 4
    replayed = sample(model, 5, state=trunk)
    fork = sample(model, 5, state=trunk, seed=8, workspace=workspace)
    again = sample(model, 5, state=trunk, workspace=workspace)
    assert same(taken, straight) and same(replayed, straight) and same(again, straight)
    assert not torch.equal(fork.latents(), straight.latents())
    assert not torch.equal(sample(model, 9).latents(), straight.latents())  # a split begins anew


@pytest.mark.parametrize("at", range(STEPS + 8))
def test_cancel_at_any_pass_keeps_what_is_done(model, at):
    """And goes on right after it with new chunks: as a run that was meant to end there."""

    def cancel(done, total):
        if done == at:
            raise Cancelled

    with session(model, on_pass=cancel) as opened:
        with pytest.raises(Cancelled):
            list(opened.generate(5, seed=7))
        opened.on_pass = None
        done = len(opened.state.records)
        assert done == max(0, (at - STEPS + 2) // 2)
        state = opened.state
        list(opened.generate(4, seed=7))
    fresh = sample(model, 5)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state.chunks, fresh.chunks))
    expected = sample(model, 4, state=state)
    assert same(opened.state, expected)


def test_leaving_a_generator_early_keeps_what_is_done(model):
    workspace = Workspace()
    with session(model, workspace=workspace) as opened:
        for chunk in opened.generate(6, seed=7):
            if chunk.start_frame == 4:
                break
    assert opened.state.frames == 6
    assert same(sample(model, 4, state=opened.state, workspace=workspace), sample(model, 4, state=opened.state))


def test_videos_side_by_side_are_each_what_it_is_alone(model):
    words = torch.cat([prompt(model, seed) for seed in (0, 1)])

    def draws(which):
        return lambda start, draw, shape: seeded_noise(7, start, (2, *shape[1:]), draw)[which]

    def made(which):
        with RollingSession(model, words[which], height=HEIGHT, width=WIDTH, batch=len(words[which])) as opened:
            list(opened.generate(7, noise_source=draws(which)))
        return opened.state.latents()

    both = made(slice(0, 2))
    for index in range(2):
        torch.testing.assert_close(both[index : index + 1], made(slice(index, index + 1)), atol=1e-5, rtol=1e-4)


def test_offloading_changes_no_bit(model):
    for storage in CACHE_STORAGES:
        cache = replace(CACHE, storage=storage)
        assert same(sample(model, 8, 4, cache=cache), sample(model, 8, 4, cache=replace(cache, offload=True)))


@pytest.mark.parametrize("storage, tolerance", [("float8", 0.2), ("int8", 0.02)])
def test_fewer_bits_change_little(model, storage, tolerance):
    plain, packed = sample(model, 8), sample(model, 8, cache=replace(CACHE, storage=storage))
    difference = (plain.latents() - packed.latents()).norm() / plain.latents().norm()
    assert 0 < difference <= tolerance


def test_a_prompt_holds_from_the_next_pass_on(model):
    """For the chunks that are on their way too; the log says which prompt each was finished under."""
    made = []
    with session(model) as opened:
        for chunk in opened.generate(6, seed=7):
            made.append(chunk.latents)
            if len(made) == 2:
                opened.set_prompt(prompt(model, 1))
    plain = sample(model, 6)
    equal = [torch.equal(ours, theirs) for ours, theirs in zip(made, plain.chunks)]
    assert equal == [True, True, False, False, False, False]
    assert [record.prompt for record in opened.state.records] == [0, 0, 1, 1, 1, 1]
    assert same(sample(model, 4, state=opened.state, words=1), replayed_in_place(model))


def test_a_prompt_that_is_typed_while_a_clean_pass_runs_holds_from_the_next_pass_on(model):
    def typed(done, total):
        if done == STEPS:
            opened.set_prompt(prompt(model, 1))

    with session(model, on_pass=typed) as opened:
        list(opened.generate(6, seed=7))
    with session(model) as other:
        for chunk in other.generate(6, seed=7):
            if chunk.start_frame == 0:
                other.set_prompt(prompt(model, 1))
    assert same(opened.state, other.state)


def replayed_in_place(model):
    with session(model) as opened:
        for number, _ in enumerate(opened.generate(6, seed=7)):
            if number == 1:
                opened.set_prompt(prompt(model, 1))
        list(opened.generate(4, seed=7))
    return opened.state


def test_guidance_is_between_two_branches(model):
    guided = replace(SAMPLING, guidance_scale=3.0)
    plain = sample(model, 5)
    same_words = sample(model, 5, sampling=guided, negative=prompt(model))
    other_words = sample(model, 5, sampling=guided, negative=prompt(model, 1))
    torch.testing.assert_close(same_words.latents(), plain.latents(), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(other_words.latents(), plain.latents(), atol=1e-2)


@pytest.mark.parametrize("before", [1, 3, 5])
def test_it_goes_on_from_any_video(model, before):
    """One that another sampler made, from a single frame, shorter than the anchor: the frames are what counts."""
    renoise = replace(SAMPLING, sampler="renoise")
    with session(model, sampling=renoise, cache=CacheConfig(9)) as opened:
        opened.prefill(torch.randn(1, 16, 1, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1)))
        list(opened.generate((before - 1) // 2, seed=7))
    state = opened.state
    assert state.frames == before
    made = sample(model, 4, 3, state=state)
    assert made.frames == before + 14 and same(made, sample(model, 3, state=sample(model, 4, state=state)))


def test_a_cache_of_other_rules_is_not_taken_over(model):
    """The same model, shape and settings; another sampler's context passes see other frames."""
    workspace = Workspace()
    state = sample(model, 8, workspace=workspace)
    renoise = dict(sampling=replace(SAMPLING, sampler="renoise"), state=state)
    assert same(sample(model, 2, workspace=workspace, **renoise), sample(model, 2, **renoise))


def test_exact_and_fast_passes_agree(model):
    exact = sample(model, 6, execution=ExecutionConfig(exact=True))
    torch.testing.assert_close(sample(model, 6).latents(), exact.latents(), atol=2e-5, rtol=1e-4)


# What it takes, and what is refused.


def test_a_runs_peak_is_about_what_was_announced():
    """A pass holds as many chunks as there are steps, and gathers what it sees, a layer at a time."""
    size, sampling = dict(height=96, width=96), replace(SAMPLING, chunk=3)
    transformer = tiny_transformer(num_attention_heads=4, attention_head_dim=24, num_layers=3, ffn_dim=384)
    model = CausalModel(transformer, ModelPreset("test", sampling, CacheConfig(12, sink=3)))
    needed = estimate(transformer, **size, sampling=sampling, cache=model.preset.cache, prompt_tokens=6)
    plain = estimate(
        transformer,
        **size,
        sampling=replace(sampling, sampler="renoise", chunk=9),
        cache=CacheConfig(12),
        prompt_tokens=6,
    )
    seen = 2 * 12 * 36 * 4 * 24 * 4  # keys and values, frames, tokens, heads, their size, float32
    assert needed.activations == plain.activations + seen
    with TensorBytes() as counted:
        opened = RollingSession(model, prompt(model), **size)
        with opened:
            list(opened.generate(6))
            assert opened.cache_bytes.device == needed.cache
    held = counted.peak - opened.state.nbytes
    assert held <= 1.1 * needed.device <= 1.6 * held


def test_fewer_chunks_than_steps_are_refused_and_the_shortest_length_is_said(model):
    message = (
        'the sampler "rolling" makes at least as many chunks at a time as it has steps: 3, not 2. The shortest length is '
        "3 chunks, 6 latent frames or {} s"
    )
    with session(model) as opened:
        with pytest.raises(ValueError) as refused:
            list(opened.generate(2))
        assert str(refused.value) == message.format("1.32")
        list(opened.generate(3))
        with pytest.raises(ValueError) as refused:
            list(opened.generate(2))
        assert str(refused.value) == message.format("1.5")
        assert list(opened.generate(0)) == []
    for seconds, start in ((1.32, 0), (1.5, 6)):
        assert SAMPLING.chunks_for_seconds(seconds, start) == 3
        SAMPLING.check_length(3, start)
    replace(SAMPLING, sampler="renoise").check_length(1)


def test_given_frames_are_refused(model):
    with session(model) as opened, pytest.raises(ValueError, match="starts from noise.*continued from its cache state"):
        opened.prefill(torch.zeros(1, 16, 2, HEIGHT // 8, WIDTH // 8))


def test_a_step_cache_is_refused(model):
    with pytest.raises(ValueError, match='step cache cannot go with the sampler "rolling".*Remove the step cache'):
        session(model, step_cache=FirstBlockCache())


def test_compiled_blocks_are_refused(model):
    """With five steps, passes of five lengths go beyond torch.compile's limit before the longest of them."""
    with pytest.raises(ValueError, match='compiled blocks cannot go with the sampler "rolling".*Turn compile off'):
        session(model, execution=ExecutionConfig(compile=True))


def test_prompt_switches_of_other_families_are_refused(model):
    with session(model, switch="hold") as opened:
        with pytest.raises(ValueError, match='switch must be "hold", got "joint"'):
            opened.set_prompt(prompt(model, 1), switch="joint")
        list(opened.generate(3, seed=7))
    with session(model, 1, sampling=replace(SAMPLING, sampler="renoise"), state=opened.state, switch="cut") as cut:
        list(cut.generate(1, seed=7))
    with pytest.raises(ValueError, match="cannot go on from a video whose prompts were switched by cut"):
        session(model, state=cut.state)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(positions="window"), 'positions must be "absolute", got "window"'),
        (dict(leaving="ema"), 'leaving must be "drop", got "ema"'),
        (dict(switch="joint"), 'switch must be "hold", got "joint"'),
        (dict(context="recomputed", sink=1, window=6), 'context must be "kept", got "recomputed"'),
        (dict(window="all"), "needs a window.* got all frames"),
        (dict(window=3), "cannot hold the sink"),
    ],
)
def test_rules_of_other_families_are_refused(model, changes, message):
    window = dict(window=8) if changes.get("leaving") == "ema" else {}
    with pytest.raises(ValueError, match=message):
        session(model, cache=replace(CACHE, **window, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(independent_first_frame=True), "cannot go with a first chunk of one frame"),
        (dict(first_chunk_steps=(1000,)), "cannot go with first_chunk_steps"),
    ],
)
def test_chunks_that_differ_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SAMPLING, **changes)
