"""Whatever way a video is cut into runs, continued or forked, it is the same video."""

import pytest
import torch
from builders import tiny_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import HEIGHT, SAMPLING, WIDTH, WINDOW, prompt, same, sample, small_model

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.schedule import seeded_noise
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState
from rolling_kv.sampling.workspace import Workspace


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize("workspace", [True, False], ids=["taken over", "replayed"])
@pytest.mark.parametrize("cache", [WINDOW, CacheConfig(ALL_FRAMES)], ids=["window", "unlimited"])
def test_two_runs_equal_one(model, workspace, cache):
    whole = sample(model, 5, cache=cache)
    shared = Workspace() if workspace else None
    part = sample(model, 2, cache=cache, workspace=shared)
    assert same(sample(model, 3, cache=cache, state=part, workspace=shared), whole)
    assert part.frames == 4 and whole.frames == 10


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4), data=st.data())
def test_any_cut_gives_the_same_bits(model, cuts, data):
    workspace, state = Workspace(), None
    for chunks in cuts:
        if data.draw(st.booleans(), label="another video in between"):
            sample(model, 1, seed=99, workspace=workspace)
        state = sample(model, chunks, state=state, workspace=workspace)
    assert same(state, sample(model, sum(cuts)))


def test_taking_over_really_takes_over(model):
    """The second run of a chain adds one context pass and its own steps; a replay adds one pass per past chunk."""
    passes = []
    workspace = Workspace()
    first = sample(model, 3, workspace=workspace)
    buffers = [parts[0].data_ptr() for parts in workspace.caches["cond"].store.layers]
    sample(model, 1, state=first, workspace=workspace, on_pass=lambda done, total: passes.append((done, total)))
    assert passes == [(0, 3), (1, 3), (2, 3)]
    assert [parts[0].data_ptr() for parts in workspace.caches["cond"].store.layers] == buffers
    passes.clear()
    sample(model, 1, state=first, on_pass=lambda done, total: passes.append((done, total)))
    assert passes == [(n, 5) for n in range(5)]


@pytest.mark.parametrize("guidance, branches", [(1.0, 1), (3.0, 2)])
def test_a_session_knows_the_bytes_of_its_cache(model, guidance, branches):
    sampling = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=guidance)
    frame = 2 * 2 * 6 * 24 * 4  # keys and values, layers, tokens, dim, float32
    words = dict(negative=prompt(model, 1), height=HEIGHT, width=WIDTH, sampling=sampling)
    session = RollingSession(model, prompt(model), cache=CacheConfig(5, sink=1, offload=True), **words)
    assert session.cache_bytes == (0, 0)
    with session:
        next(session.generate(1))
        assert session.cache_bytes == (branches * 5 * frame, branches * 5 * frame)  # offloaded: two layers, and all
    with RollingSession(model, prompt(model), cache=CacheConfig(ALL_FRAMES), **words) as session:
        sizes = [session.cache_bytes for _ in session.generate(3)]
        list(session.generate(2))
        assert session.cache_bytes.device == branches * 10 * frame
    assert sizes == [(branches * 6 * frame, 0)] * 3, "room for all of them, taken once"


def test_branches_of_one_state_do_not_disturb_each_other(model):
    workspace = Workspace()
    trunk = sample(model, 2, workspace=workspace)
    before = trunk.latents().clone()
    left = sample(model, 2, words=1, state=trunk, workspace=workspace)
    right = sample(model, 2, words=2, state=trunk, workspace=workspace)
    assert same(left, sample(model, 2, words=1, state=trunk))
    assert same(right, sample(model, 2, words=2, state=trunk))
    assert not torch.equal(left.latents(), right.latents())
    assert torch.equal(trunk.latents(), before) and trunk.frames == 4


def test_another_seed_then_the_first_again(model):
    workspace = Workspace()
    first = sample(model, 3, seed=1, workspace=workspace)
    other = sample(model, 3, seed=2, workspace=workspace)
    assert same(sample(model, 3, seed=1, workspace=workspace), first)
    assert not torch.equal(first.latents(), other.latents())


def test_a_prompt_that_changes_inside_a_session_equals_a_chain(model):
    first = sample(model, 2, words=0)
    chain = sample(model, 2, words=1, state=first)
    with RollingSession(model, prompt(model, 0), height=HEIGHT, width=WIDTH) as session:
        list(session.generate(2, seed=7))
        session.set_prompt(prompt(model, 1))
        list(session.generate(2, seed=7))
    assert same(session.state, chain)
    assert [record.prompt for record in chain.records] == [0, 0, 1, 1]
    assert not torch.equal(sample(model, 4, words=0).latents(), chain.latents())


def test_guidance_keeps_its_branches_apart(model):
    negative = prompt(model, 5)
    guided = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=2.0)
    whole = sample(model, 4, sampling=guided, negative=negative)
    workspace = Workspace()
    part = sample(model, 2, sampling=guided, negative=negative, workspace=workspace)
    assert same(sample(model, 2, sampling=guided, negative=negative, state=part, workspace=workspace), whole)
    assert not torch.equal(whole.latents(), sample(model, 4).latents())
    cond, uncond = workspace.caches["cond"], workspace.caches["uncond"]
    assert not torch.equal(cond.store.layers[-1][0], uncond.store.layers[-1][0])


def test_guidance_of_one_prompt_against_itself_changes_nothing(model):
    guided = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=4.0)
    torch.testing.assert_close(
        sample(model, 3, sampling=guided, negative=prompt(model, 0)).latents(), sample(model, 3).latents()
    )


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_many_step_sampling_splits_too(model, sampler):
    many = SamplingConfig(chunk=2, sampler=sampler, num_inference_steps=4, guidance_scale=1.5)
    arguments = dict(sampling=many, negative=prompt(model, 5))
    part = sample(model, 1, **arguments)
    assert same(sample(model, 2, state=part, **arguments), sample(model, 3, **arguments))


def test_each_sample_of_a_batch_is_its_own_video(model):
    """Noise differs along the batch, and a sample does not see its neighbours."""
    both = sample(model, 3, batch=2).latents()
    alone = sample(model, 3).latents()
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_prefill_is_part_of_the_video(model):
    given_frames = torch.randn(1, 16, 5, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        session.prefill(given_frames)
        chunks = list(session.generate(2, seed=3))
    assert [record.frames for record in session.state.records] == [1, 2, 2, 2, 2]
    assert [record.seed for record in session.state.records] == [None, None, None, 3, 3]
    assert torch.equal(session.state.latents()[:, :, :5], given_frames)
    assert [chunk.start_frame for chunk in chunks] == [5, 7]
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as other:
        other.prefill(torch.zeros_like(given_frames))
        assert not torch.equal(next(other.generate(1, seed=3)).latents, chunks[0].latents)


def test_given_frames_after_others_have_no_first_frame(model):
    single = SamplingConfig(chunk=3, denoising_steps=(1000, 500), independent_first_frame=True)
    frames = torch.zeros(1, 16, 6, HEIGHT // 8, WIDTH // 8)
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, sampling=single) as session:
        session.prefill(frames)
        session.prefill(frames)
    assert [record.frames for record in session.state.records] == [1, 2, 3, 3, 3]


def test_independent_first_frame(model):
    single = SamplingConfig(chunk=3, denoising_steps=(1000, 500), independent_first_frame=True)
    state = sample(model, 3, sampling=single)
    assert [record.frames for record in state.records] == [1, 3, 3]
    part = sample(model, 1, sampling=single)
    assert same(sample(model, 2, sampling=single, state=part), state)


def test_a_prompt_set_during_a_chunk_counts_from_the_next_one(model):
    def set_prompt(done, total):
        if done == 4:  # inside the second chunk
            session.set_prompt(prompt(model, 1))

    session = RollingSession(model, prompt(model, 0), height=HEIGHT, width=WIDTH, on_pass=set_prompt)
    with session:
        list(session.generate(4, seed=7))
    assert [record.prompt for record in session.state.records] == [0, 0, 1, 1]
    assert same(session.state, sample(model, 2, words=1, state=sample(model, 2, words=0)))


def test_a_replay_keeps_the_prompt_of_one_chunk_at_a_time(model):
    state = None
    for words in range(4):
        state = sample(model, 1, words=words, state=state)
    kept = []
    with RollingSession(model, prompt(model, 4), height=HEIGHT, width=WIDTH, state=state) as session:
        session.on_pass = lambda *_: kept.append(len(session._open.branches.prompts))
        list(session.generate(1))
    assert max(kept) == 1 and len(kept) == 4 + 2


@pytest.mark.parametrize("first, second", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_model_of_another_dtype_continues(first, second):
    """bf16 weights after float16 ones, say: in a graph, two loaders are enough."""
    videos = []
    for dtype in (first, second):
        transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12).to(dtype)
        videos.append(CausalModel(transformer, ModelPreset("test", SAMPLING, WINDOW)))
    state = sample(videos[0], 2)
    longer = sample(videos[1], 2, state=state)
    assert longer.frames == 8 and longer.chunks[-1].dtype == second and longer.latents().isfinite().all()
    assert torch.equal(longer.latents()[:, :, :4], state.latents().to(longer.latents().dtype))


def test_a_state_of_a_model_with_another_text_encoder_is_refused(model):
    other = tiny_transformer(num_attention_heads=2, attention_head_dim=12, text_dim=20)
    state = sample(CausalModel(other, ModelPreset("test", SAMPLING, WINDOW)), 1)
    with pytest.raises(ValueError, match="a prompt of the cache state must be .* text encoder of another model"):
        sample(model, 1, state=state)


@pytest.mark.parametrize("workspace", [True, False], ids=["taken over", "replayed"])
def test_chunks_without_guidance_enter_a_guided_cache_with_the_next_negative_prompt(model, workspace):
    """The log alone decides: a replay must not take the present one."""
    guided = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=2.0)
    unlimited = CacheConfig(ALL_FRAMES)
    shared = Workspace() if workspace else None
    arguments = dict(sampling=guided, cache=unlimited, workspace=shared)
    start = sample(model, 2, cache=unlimited)
    middle = sample(model, 1, state=start, negative=prompt(model, 5), **arguments)
    end = sample(model, 2, state=middle, negative=prompt(model, 6), **arguments)
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, state=start, negative=prompt(model, 5),
                        sampling=guided, cache=unlimited) as session:  # fmt: skip
        list(session.generate(1, seed=7))
        session.set_prompt(prompt(model), prompt(model, 6))
        list(session.generate(2, seed=7))
    assert same(session.state, end)


def test_another_way_to_compute_is_no_cache_to_take_over(model):
    workspace, passes = Workspace(), []
    state = sample(model, 3, workspace=workspace)
    sample(
        model,
        1,
        state=state,
        workspace=workspace,
        execution=ExecutionConfig(backend="native"),
        on_pass=lambda *pair: passes.append(pair),
    )
    assert len(passes) == 3 + 2


def test_a_state_is_nobody_elses_memory(model):
    given_frames = torch.randn(1, 16, 2, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    words = prompt(model)
    with RollingSession(model, words, height=HEIGHT, width=WIDTH) as session:
        session.prefill(given_frames)
        (chunk,) = session.generate(1)
    before = [tensor.clone() for tensor in session.state.chunks + session.state.prompts]
    with torch.inference_mode():
        for tensor in (given_frames, words, chunk.latents):
            tensor.zero_()
    assert all(map(torch.equal, session.state.chunks + session.state.prompts, before))


def test_the_working_cache_is_as_large_as_announced(model):
    for cache in (WINDOW, CacheConfig(3), CacheConfig(ALL_FRAMES)):
        workspace = Workspace()
        state = sample(model, 3, cache=cache, workspace=workspace)
        announced = estimate(
            model.transformer, HEIGHT, WIDTH, sampling=SAMPLING, cache=cache, frames=state.frames, prompt_tokens=0
        )
        assert workspace.nbytes == announced.cache and announced.prompts == announced.step_cache == 0
        assert announced.activations > 0


def test_memory_does_not_grow_with_the_length(model):
    workspace = Workspace()
    sizes = set()
    state = None
    for _ in range(6):
        state = sample(model, 3, state=state, workspace=workspace)
        sizes.add(workspace.nbytes)
    assert len(sizes) == 1


def test_noise_is_a_function_of_seed_frame_and_draw():
    shape = (2, 16, 3, 2, 2)
    assert torch.equal(seeded_noise(5, 9, shape, 1), seeded_noise(5, 9, shape, 1))
    others = [seeded_noise(*key, shape, draw) for key, draw in (((6, 9), 1), ((5, 12), 1), ((5, 9), 2))]
    assert all(not torch.equal(seeded_noise(5, 9, shape, 1), other) for other in others)
    assert torch.equal(seeded_noise(5, 9, shape, 1)[:1], seeded_noise(5, 9, (1, *shape[1:]), 1))
    wide = seeded_noise(0, 0, (1, 16, 3, 64, 64), 0)
    assert abs(wide.mean()) < 0.01 and abs(wide.std() - 1) < 0.01
    seeded_noise(2**64 - 1, 0, shape, 0)  # the largest seed of a ComfyUI widget


@pytest.mark.parametrize(
    "height, width, message",
    [
        (40, 48, "height must be a multiple of 16 pixels, got 40; the nearest are 32 and 48"),
        (32, 0, "width must be a multiple of 16 pixels, got 0"),
    ],
)
def test_sizes_are_checked(height, width, message):
    with pytest.raises(ValueError, match=message):
        WAN_21.latent_size(height, width)


def test_what_does_not_fit_is_refused_before_any_work(model):
    size = dict(height=HEIGHT, width=WIDTH)
    with pytest.raises(ValueError, match=r"the prompt must be \[1 or 1, tokens, 32\].*got \[1, 6, 31\]"):
        RollingSession(model, torch.zeros(1, 6, 31), **size)
    with pytest.raises(ValueError, match="needs a negative prompt"):
        RollingSession(model, prompt(model), sampling=SamplingConfig(guidance_scale=2.0), **size)
    with pytest.raises(ValueError, match="window of 4 latent frames cannot hold the sink"):
        RollingSession(model, prompt(model), cache=CacheConfig(4, 3), **size)
    with pytest.raises(ValueError, match="the initial latents must be"):
        RollingSession(model, prompt(model), **size).prefill(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ValueError, match="the cache state's latents must be"):
        RollingSession(model, prompt(model), height=64, width=64, state=sample(model, 1))


def test_a_state_prints_short_and_knows_its_length(model):
    state = sample(model, 2)
    assert repr(CacheState()) == "CacheState(empty)"
    assert repr(state).startswith("CacheState(4 latent frames, 4x6 latents, batch 1, key ") and len(repr(state)) < 100
    assert state.pixel_frames == 13
    assert state.nbytes == sum(chunk.nbytes for chunk in state.chunks) + state.prompts[0].nbytes
    with pytest.raises(ValueError, match="holds no frames"):
        CacheState().latents()
