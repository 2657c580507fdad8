"""A schedule in one run, in several that continue each other, and as switches by hand: the same video, bit for bit."""

import re
from dataclasses import replace

import pytest
import torch
from videos import HEIGHT, SAMPLING, WIDTH, prompt, same, small_model

from rolling_kv.config import CacheConfig
from rolling_kv.sampling.blend import blend_prompts
from rolling_kv.sampling.scheduled import check_plan, cues, generate_scheduled, switch_of, switches_of
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.workspace import Workspace
from rolling_kv.schedules.reading import read_schedule
from rolling_kv.schedules.schedule import PromptSchedule, Segment

CACHE = CacheConfig(6, sink=2, switch="joint")
SCHEDULE = read_schedule(
    "0: 0\n0.6: 1 [cut]\n1.2: 2 [blend 4]\n2.8: 1\n3.4: 0 [flush]\n4: 2 [recache]\n4.5: 1 [slerp 3]"
)
CHUNKS = 13
GUIDED = replace(SAMPLING, guidance_scale=2.0)


@pytest.fixture(scope="module")
def model():
    return small_model()


def embeds(model, schedule=SCHEDULE):
    return {text: (prompt(model, int(text)), None) for text in schedule.texts}


def run(model, chunks, schedule=SCHEDULE, state=None, origin="video", given=None, sampling=SAMPLING, **settings):
    """One run of a schedule. given: latents that it starts from."""
    words = embeds(model, schedule)
    start = (state.frames if state else 0) + (given.shape[2] if given is not None else 0)
    plan = schedule.plan(sampling, model.geometry, chunks=chunks, start_frame=start, origin=origin)
    cache = settings.setdefault("cache", CACHE)
    negative = prompt(model, 9) if sampling.guided else None
    first = next(cues(plan, words, cache)).prompt
    session = RollingSession(
        model, first, height=HEIGHT, width=WIDTH, sampling=sampling, state=state, negative=negative, **settings
    )
    with session:
        if given is not None:
            session.prefill(given)
        list(generate_scheduled(session, plan, words, negative=negative, seed=3))
    return session.state


def test_every_word_does_what_it_says(model):
    """Against a session in which each prompt is set by hand, before the chunk that it begins with."""
    plan = SCHEDULE.plan(SAMPLING, model.geometry, chunks=CHUNKS)
    numbers = [number for number, _ in plan.begins]
    by_hand = dict(zip(numbers, [
        (0, None, 1, "linear"), (1, "cut", 1, "linear"), (2, None, 4, "linear"), (1, None, 1, "linear"),
        (0, "flush", 1, "linear"), (2, "joint", 1, "linear"), (1, None, 3, "slerp"),
    ]))  # fmt: skip
    assert len(by_hand) == 7 and numbers[3] - numbers[2] < 4  # a prompt comes before a blend is done
    with RollingSession(model, prompt(model, 0), height=HEIGHT, width=WIDTH, cache=CACHE) as session:
        for number in range(CHUNKS):
            if number in by_hand:
                words, switch, blend, curve = by_hand[number]
                session.set_prompt(prompt(model, words), None, switch, blend=blend, curve=curve)
            list(session.generate(1, seed=3))
    made = run(model, CHUNKS)
    assert same(made, session.state)
    assert [record.switch for record in made.records if record.switch] == ["cut", "joint", "flush", "joint"]


@pytest.mark.parametrize("sampling", [SAMPLING, GUIDED, replace(SAMPLING, independent_first_frame=True)])
def test_runs_that_continue_each_other_make_the_same_video_wherever_they_are_cut(model, sampling):
    """At every chunk, those of the blends too: from what was made before, and chunk by chunk with the cache taken over."""
    whole = run(model, CHUNKS, sampling=sampling)
    workspace, state = Workspace(), None
    for _ in range(CHUNKS):
        state = run(model, 1, state=state, sampling=sampling, workspace=workspace)
    assert same(state, whole)
    for cut in (1, 3, 5, 6, 11, 12):
        first = run(model, cut, sampling=sampling)
        assert same(run(model, CHUNKS - cut, state=first, sampling=sampling), whole)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_given_frames_come_before_and_times_count_from_them_or_from_behind(model, frames):
    given = torch.randn(1, 16, frames, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    whole = run(model, 8, given=given)
    assert {record.prompt for record in whole.records[: -(-frames // 2)]} == {0}
    first = run(model, 3, given=given)
    assert same(run(model, 5, state=first), whole)
    behind = run(model, 8, given=given, origin="run")
    begun = next(index for index, record in enumerate(behind.records) if record.switch == "cut")
    assert sum(record.frames for record in behind.records[:begun]) == frames + 4


def test_times_may_count_from_the_run(model):
    before = run(model, 3, read_schedule("0: 1"))
    again = run(model, 6, read_schedule("0: 0 [blend 3]\n1.4: 2 [cut]"), before, origin="run")
    mixed = blend_prompts(prompt(model, 1), prompt(model, 0), 3)
    used = [again.prompts[record.prompt] for record in again.records[3:]]
    expected = [*mixed, prompt(model, 2), prompt(model, 2), prompt(model, 2)]
    assert all(torch.equal(a, b) for a, b in zip(used, expected))
    assert [record.switch for record in again.records] == [""] * 6 + ["cut", "", ""]


def test_a_shot_is_begun_by_its_first_chunk_alone(model):
    """With the family's marker, in the text as in Encode Prompt; a marker of another family is none."""
    texts = ["A dog.", "The scene transitions. A cat."]
    schedule = PromptSchedule((Segment(texts[0], 0.0), Segment(texts[1], 1.0)))
    words = {texts[0]: (prompt(model, 0), None), texts[1]: (prompt(model, 1), prompt(model, 2))}
    plan = schedule.plan(SAMPLING, chunks=6)
    shots = CacheConfig(8, sink=2, cut_flush=False, cut_offset=8, shot_sink=True)
    made = list(cues(plan, words, shots, "The scene transitions. "))
    assert [cue.switch for cue in made] == [None, None, None, "cut", "hold", None]
    seeds = [next(n for n in range(3) if torch.equal(cue.prompt, prompt(model, n))) for cue in made]
    assert seeds == [0, 0, 0, 1, 2, 2]
    assert [cue.switch for cue in cues(plan, words, shots)] == [None] * 6
    with pytest.raises(ValueError, match=r'at 1.3125 s, \[cut\]: a "cut" at a prompt switch cannot go with'):
        check_plan(plan, SAMPLING, CacheConfig(6, 2, "window", leaving="ema"), "The scene transitions. ")


def test_a_prompt_that_did_not_change_is_no_switch(model):
    made = run(model, 6, read_schedule("0: 0\n1: 0\n2: 0 [cut]"))
    assert [record.switch for record in made.records] == ["", "", "", "", "", "cut"]
    assert len(made.prompts) == 1


def test_progress_counts_the_passes_of_switches(model):
    told = []
    run(model, CHUNKS, on_pass=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(len(told)))
    assert all(done < total for done, total in told) and told[-1][1] == len(told)


def test_recache_is_the_familys_own_or_chunk_by_chunk():
    recache = Segment("a", 0.0, "recache")
    ways = {switch: switch_of(recache, CacheConfig(switch=switch)) for switch in ("hold", "joint", "causal", "flush")}
    assert ways == {"hold": "causal", "joint": "joint", "causal": "causal", "flush": "causal"}
    assert switch_of(Segment("a", 0.0), CACHE) is None
    assert switch_of(Segment("a", 0.0, None, 2), CACHE) == "hold"
    assert switches_of(SCHEDULE.plan(SAMPLING, chunks=CHUNKS), CACHE) == {"cut", "hold", "joint", "flush"}
    assert switches_of(read_schedule("0: a [cut]").plan(SAMPLING, chunks=4), CACHE) == set()


@pytest.mark.parametrize(
    "cache, word, message",
    [
        (CacheConfig(6, 2, "window", leaving="ema"), "cut", 'a "cut" at a prompt switch cannot go with leaving "ema"'),
        (CacheConfig(6, context="recomputed"), "recache", 'a "causal" at a prompt switch cannot go with the context'),
    ],
)
def test_what_the_rules_cannot_do_is_refused_before_anything_is_sampled(model, cache, word, message):
    schedule = read_schedule(f"0: 0\n1: 1 [{word}]")
    plan = schedule.plan(SAMPLING, model.geometry, chunks=6)
    with pytest.raises(ValueError, match=rf"the schedule, at 1.3125 s, \[{word}\]: " + re.escape(message)):
        check_plan(plan, SAMPLING, cache)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(model, 6, schedule, cache=cache, on_pass=lambda *_: pytest.fail("sampled"))
