"""What keeps one run from taking over another's working cache, and which facts of a video are in its key."""

from dataclasses import fields, replace

import pytest
import torch
from builders import tiny_transformer
from videos import SAMPLING, WINDOW, prompt, same, sample, small_model

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState
from rolling_kv.sampling.workspace import CacheSpec, Workspace

GUIDED = replace(SAMPLING, guidance_scale=2.0)


@pytest.fixture(scope="module")
def model():
    return small_model()


def passes_of(model, state, workspace, chunks=1, **settings):
    """Passes that so many more chunks take: with a replay, one more for every chunk of the state but one."""
    counted = []
    sample(model, chunks, state=state, workspace=workspace, on_pass=lambda *pair: counted.append(pair), **settings)
    return len(counted)


CACHES = {
    "window": replace(WINDOW, window=6),
    "all frames": CacheConfig(ALL_FRAMES),
    "sink": replace(WINDOW, sink=2),
    "positions": replace(WINDOW, sink=1, positions="window"),
    "storage": replace(WINDOW, storage="int8"),
    "offload": replace(WINDOW, offload=True),
    "span": replace(WINDOW, sink=1, positions="window", span=6),
    "leaving": CacheConfig(6, sink=2, leaving="ema"),
    "ema_alpha": CacheConfig(6, sink=2, leaving="ema", ema_alpha=0.5),
    "accumulate": CacheConfig(6, sink=2, leaving="ema", ema_alpha=0.5, accumulate="model"),
    "memory_alphas": CacheConfig(6, sink=1, positions="window", leaving="memory", memory_alphas=(0.2, 0.9)),
    "switch": replace(WINDOW, switch="joint"),
    "global_sink": replace(WINDOW, switch="joint", global_sink=False),
    "cut_flush": replace(WINDOW, switch="cut", cut_flush=False),
    "cut_offset": replace(WINDOW, switch="cut", cut_offset=8),
    "shot_sink": replace(WINDOW, switch="cut", shot_sink=True),
    "shot_clean": replace(WINDOW, switch="cut", cut_flush=False, shot_clean=True),
}
OTHERS = {
    **{name: dict(cache=cache) for name, cache in CACHES.items()},
    "guidance": dict(sampling=GUIDED),
    "exact": dict(execution=ExecutionConfig(exact=True)),
    "backend": dict(execution=ExecutionConfig(backend="native")),
}


def test_every_setting_of_a_cache_is_tried():
    # How the context comes about is told apart by the session that it needs.
    assert {field.name for field in fields(CacheConfig)} - {"context"} <= CACHES.keys()


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_cache_with_another_setting_is_not_taken_over(model, other):
    """The video is what it would be on a fresh start, and the passes are those of a replay."""
    negative = dict(negative=prompt(model, 5)) if "sampling" in other else {}
    workspace = Workspace()
    state = sample(model, 3, workspace=workspace)
    before = passes_of(model, state, None, **other, **negative)
    assert passes_of(model, state, workspace, **other, **negative) == before
    workspace = Workspace()
    sample(model, 3, workspace=workspace)
    taken = sample(model, 1, state=state, workspace=workspace, **other, **negative)
    fresh = sample(model, 1, state=state, **other, **negative)
    assert torch.equal(taken.latents(), fresh.latents())


def test_guided_and_unguided_runs_take_turns(model):
    """A cache without the negative branch would silently turn guidance off."""
    negative, workspace = prompt(model, 5), Workspace()
    plain = sample(model, 2, workspace=workspace)
    guided = sample(model, 1, state=plain, workspace=workspace, sampling=GUIDED, negative=negative)
    assert torch.equal(guided.latents(), sample(model, 1, state=plain, sampling=GUIDED, negative=negative).latents())
    unguided = sample(model, 1, state=plain, workspace=workspace)
    assert not torch.equal(guided.latents(), unguided.latents())
    assert torch.equal(unguided.latents(), sample(model, 1, state=plain).latents())


def test_another_models_cache_is_not_taken_over(model):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12)
    transformer.blocks[0].attn1.to_k.weight.mul_(1.5)
    other = CausalModel(transformer, ModelPreset("test", SAMPLING, WINDOW))
    workspace = Workspace()
    state = sample(model, 3, workspace=workspace)
    taken = sample(other, 1, state=state, workspace=workspace)
    assert torch.equal(taken.latents(), sample(other, 1, state=state).latents())


def test_another_dtypes_cache_is_not_taken_over():
    model, workspace = small_model(), Workspace()
    state = sample(model, 3, workspace=workspace)
    identity = model.identity
    model.transformer.to(torch.bfloat16)
    model.identity = identity  # whatever else tells them apart
    taken = sample(model, 1, state=state, workspace=workspace)
    assert torch.equal(taken.chunks[-1], sample(model, 1, state=state).chunks[-1])


def test_cuda_graphs_are_no_reason_to_replay(model):
    """Recorded or not, keys and values are the same."""
    specs = [
        CacheSpec.of(model, 1, (4, 6), WINDOW, ExecutionConfig(cuda_graphs=recorded), 1) for recorded in (True, False)
    ]
    assert specs[0] == specs[1]


FACTS = {
    "chunk": dict(chunk=torch.ones(1, 16, 2, 4, 6)),
    "timestep": dict(timestep=1.0),
    "prompt": dict(prompt=torch.ones(1, 3, 8)),
    "negative": dict(negative=torch.ones(1, 3, 8)),
    "another negative": dict(negative=torch.full((1, 3, 8), 2.0)),
    "seed": dict(seed=1),
    "given": dict(seed=None),
    "dtype": dict(chunk=torch.zeros(1, 16, 2, 4, 6, dtype=torch.bfloat16)),
    "shape": dict(chunk=torch.zeros(1, 16, 2, 6, 4)),
}


def test_each_fact_of_a_chunk_changes_the_key():
    facts = dict(chunk=torch.zeros(1, 16, 2, 4, 6), timestep=0.0, prompt=torch.zeros(1, 3, 8), negative=None, seed=0)

    def key(model="one", **changes):
        values = facts | changes
        return CacheState(model=model).extended(values.pop("chunk"), **values).key

    keys = [key(), key(model="another"), *(key(**changes) for changes in FACTS.values())]
    assert len(set(keys)) == len(keys)
    assert key() == key()


def test_the_order_of_chunks_changes_the_key():
    first, second = torch.zeros(1, 16, 1, 4, 6), torch.ones(1, 16, 1, 4, 6)
    log = dict(timestep=0.0, prompt=torch.zeros(1, 3, 8), negative=None, seed=0)
    one, two = CacheState().extended(first, **log), CacheState().extended(second, **log)
    assert one.extended(second, **log).key != two.extended(first, **log).key


def test_given_frames_enter_the_cache_clean(model):
    """At timestep 0, whatever noise the model's own chunks get in their context passes."""
    noisy = SamplingConfig(chunk=2, denoising_steps=(1000, 500), context_noise=300.0)
    with RollingSession(model, prompt(model), height=32, width=48, sampling=noisy) as session:
        session.prefill(torch.zeros(1, 16, 2, 4, 6))
        list(session.generate(2))
    assert [record.timestep for record in session.state.records] == [0.0, 300.0, 300.0]


def test_every_chunk_is_replayed_with_its_own_negative_prompt(model):
    """Three segments, a negative prompt each: a replay equals the chain that took over."""
    workspace, state = Workspace(), None
    for words in (5, 6, 7):
        state = sample(model, 1, state=state, workspace=workspace, sampling=GUIDED, negative=prompt(model, words))
    last = dict(sampling=GUIDED, negative=prompt(model, 7))
    taken = sample(model, 1, state=state, workspace=workspace, **last)
    replayed = sample(model, 1, state=state, **last)
    assert torch.equal(taken.latents(), replayed.latents())
    assert len({record.negative for record in state.records}) == 3


def test_progress_counts_the_steps_of_a_first_chunk_that_has_others(model):
    sampling = SamplingConfig(chunk=2, denoising_steps=(1000,), first_chunk_steps=(1000, 750, 500))
    counted = []
    sample(model, 3, sampling=sampling, on_pass=lambda *pair: counted.append(pair))
    assert counted == [(done, 7) for done in range(7)]  # 3 steps, then twice a context pass and a step


def projections(model, monkeypatch):
    """Notes every prompt that goes through the model's text embedder."""
    seen, embedder = [], model.transformer.condition_embedder.text_embedder
    monkeypatch.setattr(embedder, "forward", lambda x, forward=embedder.forward: seen.append(x) or forward(x))
    return seen


def test_a_prompt_is_projected_once_for_all_runs_that_share_a_workspace(monkeypatch):
    model, workspace = small_model(), Workspace()
    seen = projections(model, monkeypatch)
    state = sample(model, 2, workspace=workspace)
    assert len(seen) == 1 and workspace.device_nbytes > workspace.nbytes
    bytes_of_one = workspace.device_nbytes
    state = sample(model, 1, state=state, workspace=workspace)
    sample(model, 1, seed=9, workspace=workspace)  # of another video
    assert len(seen) == 1
    sample(model, 1, words=3, state=state, workspace=workspace)  # and of a replay
    assert len(seen) == 2
    assert len(workspace.prompts) == 1 and workspace.device_nbytes == bytes_of_one
    sample(model, 1, cache=replace(WINDOW, window=6), words=3, workspace=workspace)
    assert len(seen) == 3
    workspace.clear()
    assert workspace.device_nbytes == 0


def test_a_kept_prompt_changes_no_bit():
    model, workspace, state, alone = small_model(), Workspace(), None, None
    for words in (0, 1, 0, 0):
        state = sample(model, 2, words=words, state=state, workspace=workspace)
        alone = sample(model, 2, words=words, state=alone)
        assert state.key == alone.key


CARRIED = {
    **{name: dict(cache=cache) for name, cache in CACHES.items()},
    "a cut away": dict(cache=CacheConfig(5, sink=1, positions="window", switch="cut", cut_offset=8)),
    "guidance": dict(sampling=GUIDED),
    "joint passes": dict(
        sampling=SamplingConfig(chunk=2, sampler="rolling", denoising_steps=(1000, 500)), cache=CacheConfig(7, sink=2)
    ),
}


@pytest.mark.parametrize("settings", CARRIED.values(), ids=CARRIED)
def test_a_state_that_carries_its_keys_goes_on_any_number_of_times_without_a_replay(model, settings):
    """Taken over, carried or replayed: the same bits."""
    negative = dict(negative=prompt(model, 5)) if settings.get("sampling") is GUIDED else {}
    settings, workspace = settings | negative, Workspace()
    # A switch before the very last chunk is still under way; joint passes make two chunks at least.
    last = 2 if "sampling" in settings else 1
    state = sample(model, 5 - last, keep_keys=True, **settings)
    assert state.keys is not None
    state = sample(model, last, words=1, state=state, keep_keys=True, **settings)
    assert state.keys is not None and state.keys.cached_chunks == 4
    assert state.nbytes == state._replace(keys=None).nbytes + state.keys.nbytes
    bare = state._replace(keys=None)
    replayed = sample(model, 2, words=2, seed=9, state=bare, **settings)
    for _ in range(2):
        carried = sample(model, 2, words=2, seed=9, state=state, **settings)
        assert torch.equal(carried.latents(), replayed.latents()) and carried.key == replayed.key
        assert carried.keys is None
    sample(model, last, state=sample(model, 5 - last, **settings), workspace=workspace, words=1, **settings)
    assert passes_of(model, state, None, 2, **settings) == passes_of(model, bare, workspace, 2, **settings)


def test_keys_that_a_state_carries_are_for_the_same_settings_and_its_own_video(model):
    state = sample(model, 3, keep_keys=True)
    wider = dict(cache=replace(WINDOW, window=6))
    assert passes_of(model, state, None, **wider) == passes_of(model, state._replace(keys=None), None, **wider)
    assert state.named([("a circle", prompt(model))]).keys is state.keys and state.first(frames=4).keys is None
    assert sample(model, 1, state=state).keys is None


def test_comfyui_sees_the_ram_of_keys_that_a_state_carries(model):
    """It looks for tensors in lists and tuples alone."""

    def seen(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        return sum(map(seen, value)) if isinstance(value, (list, tuple)) else 0

    state = sample(model, 3, keep_keys=True)
    assert seen(state) == state.nbytes > 2 * state._replace(keys=None).nbytes


def test_a_video_without_the_memory_for_its_keys_is_made_all_the_same(model, monkeypatch, caplog):
    monkeypatch.setattr("rolling_kv.devices.available_memory", lambda: 0)
    state = sample(model, 3, keep_keys=True)
    assert state.keys is None and same(state, sample(model, 3)) and "carries no keys" in caplog.text
    assert "(keep_keys)" in caplog.text and "offload" not in caplog.text


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_a_video_outlives_memory_that_runs_out_while_its_keys_are_put_aside(error, model, monkeypatch, caplog):
    def fail(cache):
        raise error

    monkeypatch.setattr("rolling_kv.cache.rolling.RollingKVCache.kept_frames", fail)
    state = sample(model, 3, keep_keys=True)
    assert state.keys is None and same(state, sample(model, 3)) and "carries no keys" in caplog.text
    error.args = ("something else",)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="something else"):
            sample(model, 3, keep_keys=True)
