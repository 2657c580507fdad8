"""Videos side by side, each with a seed of its own: each is what it would be alone, however they were made and continued."""

from dataclasses import replace

import pytest
import torch
from stand_in_vae import StandInVae
from torch.overrides import TorchFunctionMode
from videos import HEIGHT, SAMPLING, WIDTH, WINDOW, prompt, same, small_model

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.sampling.schedule import seeded_noise
from rolling_kv.sampling.scheduled import generate_scheduled
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState
from rolling_kv.sampling.state_file import load_state, read_state, save_state
from rolling_kv.sampling.summary import summarize
from rolling_kv.sampling.workspace import Workspace
from rolling_kv.schedules.reading import read_schedule

SEEDS = (5, 9, 1)
GUIDED = replace(SAMPLING, guidance_scale=2.0)
SOLVER = SamplingConfig(chunk=2, num_inference_steps=3, guidance_scale=1.5, sampler="unipc")
SCHEDULE = read_schedule("0: 0\n0.6: 1 [cut]\n0.8: 2 [slerp 3]\n1.5: 1\n1.8: 0 [flush]")
WAYS = {
    "few steps": {},
    "guidance": dict(sampling=GUIDED),
    "a solver": dict(sampling=SOLVER),
    "another solver": dict(sampling=replace(SOLVER, sampler="euler")),
    "rolling": dict(
        sampling=SamplingConfig(chunk=2, sampler="rolling", denoising_steps=(1000, 750, 500), context_noise=100.0),
        cache=CacheConfig(9, sink=2),
    ),
    "a recomputed context": dict(cache=CacheConfig(4, context="recomputed"), vae=StandInVae()),
    "averages": dict(cache=CacheConfig(6, sink=2, leaving="ema")),
    "int8": dict(cache=replace(WINDOW, storage="int8")),
    "a schedule": dict(schedule=SCHEDULE, cache=CacheConfig(6, sink=2, switch="joint")),
    "given frames": dict(given=3),
    "a given frame in the first chunk": dict(given=1, sampling=replace(SAMPLING, given_frame="in chunk")),
    "a source": dict(source=torch.randn(3, 16, 14, 4, 6, generator=torch.Generator().manual_seed(3))),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def model():
    return small_model()


def run(model, chunks, seeds=SEEDS, videos=(0, 1, 2), state=None, *, given=0, schedule=None, source=None, **settings):
    """A run of some of three videos that have prompts, given frames and sources of their own."""
    picked = list(videos)
    words = [torch.cat([prompt(model, 10 * word + video) for video in picked]) for word in range(3)]
    sampling = settings.get("sampling", SAMPLING)
    negative = torch.cat([prompt(model, 90 + video) for video in picked]) if sampling.guided else None
    start = state.frames if state else 0
    session = RollingSession(
        model, words[0], negative=negative, height=HEIGHT, width=WIDTH, batch=len(picked), state=state, **settings
    )
    with session:
        if given and not start:
            session.prefill(torch.randn(3, 16, given, 4, 6, generator=torch.Generator().manual_seed(2))[picked])
        if schedule is not None:
            plan = schedule.plan(sampling, model.geometry, chunks=chunks, start_frame=start)
            list(generate_scheduled(session, plan, {str(n): (word, None) for n, word in enumerate(words)}, seed=seeds))
        elif source is not None:
            list(session.generate(chunks, seed=seeds, source=source[picked, :, start:], strength=0.5))
        else:
            list(session.generate(chunks, seed=seeds))
    return session.state


def close(a: CacheState, b: CacheState, way=None) -> bool:
    """Equal but for rounding: a processor's matrix product may round otherwise for more rows, and int8 makes a step of that."""
    tolerance = 1e-2 if way is WAYS["int8"] else 1e-5
    return a.records == b.records and torch.allclose(a.latents(), b.latents(), atol=tolerance, rtol=1e-4)


@ways
def test_each_video_is_what_it_is_alone(model, way):
    together = run(model, 6, **way)
    alone = [run(model, 6, (seed,), (video,), **way) for video, seed in enumerate(SEEDS)]
    for video, state in enumerate(alone):
        assert close(together.video(video), state, way)
    assert not close(*alone[:2])


@ways
def test_runs_and_forks_equal_one(model, way):
    workspace = Workspace()
    first = run(model, 3, workspace=workspace, **way)
    second = run(model, 3, state=first, workspace=workspace, **way)
    assert same(run(model, 3, state=first, workspace=workspace, **way), second)
    assert same(run(model, 3, state=first, **way), second)
    if way is not WAYS["rolling"]:  # whose runs give up the chunks that are under way
        assert same(run(model, 6, **way), second)


@ways
def test_a_video_of_a_batch_goes_on_alone(model, way):
    first = run(model, 3, **way)
    together = run(model, 3, state=first, **way)
    for video in (0, 2):
        alone = run(model, 3, (SEEDS[video],), (video,), first.video(video), **way)
        assert close(together.video(video), alone, way)


def test_what_is_computed_for_all_videos_is_computed_as_for_one(model):
    """No kernel is asked for another number of rows where that can be helped: what is left depends on the processor."""
    transformer, seen = model.transformer, set()
    functions = {"conv3d": transformer.patch_embedding, "linear": transformer.condition_embedder.time_proj}
    weights = [module.weight for module in functions.values()]

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ in functions and any(args[1] is weight for weight in weights):
                seen.add((func.__name__, args[0].shape))
            return func(*args, **(kwargs or {}))

    with Watched():
        for way in ({}, WAYS["a given frame in the first chunk"]):
            run(model, 1, 5, (0,), **way)
            alone = set(seen)
            assert len(alone) >= 2
            run(model, 1, **way)
            assert seen == alone


def side_by_side(*states: CacheState) -> CacheState:
    """The batch of videos that were made alone, with logs that differ in nothing but the seeds."""
    together = CacheState(model=states[0].model)
    for chunks, records in zip(zip(*(state.chunks for state in states)), zip(*(state.records for state in states))):
        prompts = [state.prompts[record.prompt] for state, record in zip(states, records)]
        first, seeds = records[0], tuple(record.seed for record in records)
        together = together.extended(
            torch.cat(chunks),
            timestep=first.timestep,
            prompt=torch.cat(prompts),
            negative=None,
            seed=None if first.seed is None else seeds,
            switch=first.switch,
            given=first.given,
        )
    return together


def test_a_video_of_a_batch_is_the_same_state_by_its_key(model):
    for way in (WAYS["a schedule"], WAYS["given frames"], WAYS["a given frame in the first chunk"]):
        alone = [run(model, 6, (seed,), (video,), **way) for video, seed in enumerate(SEEDS)]
        together = side_by_side(*alone)
        assert len({together.key, *(state.key for state in alone)}) == 4
        for video, state in enumerate(alone):
            assert same(together.video(video), state)
            assert together.video(video).records == state.records


def test_prompts_that_differ_in_another_video_alone_are_one(model):
    ours, theirs = prompt(model, 0), [prompt(model, 1), prompt(model, 2)]
    state = CacheState(model=model.identity)
    for number, other in enumerate(theirs):
        chunk = torch.full((2, 16, 2, 4, 6), float(number))
        state = state.extended(chunk, timestep=0.0, prompt=torch.cat([ours, other]), negative=None, seed=(1, 2))
    state = state.named([("a and b", state.prompts[0]), ("a and c", state.prompts[1])])
    assert len(state.prompts) == len(state.video(1).prompts) == 2 and len(state.video(0).prompts) == 1
    assert state.video(0).texts == ("a and b",) and state.video(1).texts == state.texts


def test_there_is_no_video_behind_the_last(model):
    state = run(model, 1)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"no video {index} in a batch of 3"):
            state.video(index)
    with pytest.raises(IndexError, match="no video 0 in a batch of 0"):
        CacheState().video(0)


def test_noise_is_that_of_a_single_video():
    shape = (3, 16, 2, 4, 6)
    together = seeded_noise(SEEDS, 6, shape, 1)
    for noise, seed in zip(together, SEEDS):
        assert torch.equal(noise, seeded_noise(seed, 6, (1, *shape[1:]), 1)[0])
    shared = seeded_noise(5, 6, shape, 1)
    assert torch.equal(shared[0], together[0]) and not torch.equal(shared[1], shared[0])


def test_a_single_video_has_a_single_seed(model):
    assert same(run(model, 2, [5], (0,)), run(model, 2, 5, (0,)))
    assert run(model, 1, [5], (0,)).records[0].seed == 5
    assert run(model, 1, range(3)).records[0].seed == (0, 1, 2)


def test_seeds_are_in_the_key(model):
    """What is made with one seed, and with three that begin with it, are two logs."""
    chunk = torch.ones(2, 16, 2, 4, 6)
    made = [
        CacheState().extended(chunk, timestep=0.0, prompt=prompt(model, 0, 2), negative=None, seed=seed)
        for seed in (5, (5, 5), (5, 6))
    ]
    assert len({state.key for state in made}) == 3


def test_as_many_seeds_as_videos(model):
    for seeds in ((), (1,), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=f"one seed for each of the 3 videos, or one for all, got {len(seeds)}"):
            run(model, 1, seeds)


def test_seeds_come_back_from_a_file(model, tmp_path):
    state = run(model, 2, state=run(model, 2, 7), schedule=None)
    path = save_state(state, tmp_path / "batch.safetensors")
    loaded = load_state(path, model)
    assert same(loaded, state) and loaded.records == state.records
    assert [record.seed for record in loaded.records] == [7, 7, SEEDS, SEEDS]
    assert read_state(path).records == state.records
    assert same(run(model, 2, state=loaded), run(model, 2, state=state))


def test_seeds_are_in_the_table(model):
    summary = summarize(run(model, 2, state=run(model, 1, 7)))
    assert [part.seed for part in summary.stretches] == [7, SEEDS]
    lines = summary.table().splitlines()
    assert "  7        -  " in lines[1] and "  5, 9, 1  -  " in lines[2]
