"""What is said to a run while it goes on: its schedule, rendered again, makes the same video bit for bit."""

import random
import re
import threading
from dataclasses import replace

import pytest
import torch
from videos import HEIGHT, SAMPLING, WIDTH, Cancelled, prompt, same, small_model

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.sampling.scheduled import cues, generate_scheduled
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.steering import Steering
from rolling_kv.schedules.reading import read_schedule
from rolling_kv.wan.offloaded import offload_blocks

CACHE = CacheConfig(6, sink=2, switch="joint")
PLANNED = read_schedule("0: 0\n1.2: 2 [blend 4]\n3.4: 0 [flush]\n9: 1 [cut]")
WAYS = ("", "hold", "recache", "flush", "cut", "blend 2", "blend 4", "slerp 3")
CHUNKS = 12
ROLLING = SamplingConfig(chunk=2, denoising_steps=(1000, 750, 500), sampler="rolling")


@pytest.fixture(scope="module")
def model():
    return small_model()


class Run:
    """A run of a schedule, open to be steered. said: before which chunks, counted from 1, what is said how."""

    def __init__(self, model, chunks, schedule=PLANNED, said=None, state=None, origin="video", given=None,
                 sampling=SAMPLING, cache=CACHE, stop_after=None, seed=3):  # fmt: skip
        start = (state.frames if state else 0) + (given.shape[2] if given is not None else 0)
        self.plan = plan = schedule.plan(sampling, model.geometry, chunks=chunks, start_frame=start, origin=origin)
        self.steering = Steering(plan, lambda text: (prompt(model, int(text)), None), sampling, cache)
        embeds = {text: (prompt(model, int(text)), None) for text in plan.texts}
        negative = prompt(model, 9) if sampling.guided else None
        session = RollingSession(
            model, next(cues(plan, embeds, cache)).prompt, height=HEIGHT, width=WIDTH, sampling=sampling, cache=cache,
            state=state, negative=negative,
        )  # fmt: skip
        with session:
            if said and 1 in said:
                self.steering.prompt(*said[1])
            if given is not None:
                session.prefill(given)
            made = generate_scheduled(session, plan, embeds, negative=negative, seed=seed, steering=self.steering)
            for number, _ in enumerate(self.steering.heeded(made, chunks), 1):
                if said and number + 1 in said:
                    self.steering.prompt(*said[number + 1])
                if number == stop_after:
                    self.steering.stop()
        self.state = session.state

    @property
    def copied(self):
        return read_schedule(str(self.steering.schedule))


def some_words(generator, ways=WAYS):
    chunks = sorted(generator.sample(range(2, CHUNKS + 1), generator.randint(1, 5)))
    return {number: (str(generator.randint(0, 5)), generator.choice(ways)) for number in chunks}


@pytest.mark.parametrize("number", range(8))
def test_the_copied_schedule_makes_the_same_video(model, number):
    """Whatever is said when: also during blends, in guided runs, behind given frames, behind other runs, from either origin."""
    generator = random.Random(number)
    sampling = [SAMPLING, replace(SAMPLING, guidance_scale=2.0), replace(SAMPLING, independent_first_frame=True)][
        number % 3
    ]
    settings = {"sampling": sampling}
    if number % 4 == 1:
        frames = generator.choice([1, 2, 5])
        settings["given"] = torch.randn(
            1, 16, frames, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1)
        )
    if number % 4 == 2:
        settings["state"] = Run(model, 3, said={3: ("4", "slerp 3")}, sampling=sampling).state
    settings["origin"] = generator.choice(["video", "run"])
    said = some_words(generator)
    steered = Run(model, CHUNKS, said=said, **settings)
    again = Run(model, CHUNKS, steered.copied, **settings)
    assert same(steered.state, again.state), (said, str(steered.steering.schedule))
    assert steered.steering.changed and not again.steering.changed


@pytest.mark.parametrize("number", range(2))
def test_also_with_the_joint_sampler(model, number):
    said = some_words(random.Random(number), ("", "hold", "blend 3", "slerp 2"))
    settings = {"sampling": ROLLING, "cache": CacheConfig(6, sink=2)}
    planned = read_schedule("0: 0\n2.4: 1 [blend 4]")
    steered = Run(model, CHUNKS, planned, said, **settings)
    assert same(steered.state, Run(model, CHUNKS, steered.copied, **settings).state)
    stopped = Run(model, CHUNKS, planned, said, stop_after=7, **settings)
    assert stopped.steering.changed and stopped.copied.end is None
    whole = Run(model, CHUNKS, stopped.copied, **settings).state
    assert same(stopped.state, whole.first(frames=stopped.state.frames))


def test_a_prompt_holds_until_the_schedules_next_one(model):
    steered = Run(model, CHUNKS, said={3: ("3", "blend 3"), 4: ("4", "cut"), 9: ("1", "")})
    assert str(steered.steering.schedule).splitlines() == [
        "0: 0", "0.8125: 3 [blend 3]", "1.3125: 4 [cut]", "3.8125: 1", "9.3125: 1 [cut]",
    ]  # fmt: skip


def test_a_schedule_that_goes_on_behind_the_run_stays_whole(model):
    planned = read_schedule("0: 0\n2: 1\n30: 2 [cut]\n60: [end]")
    steered = Run(model, 4, planned, {2: ("4", "hold")})
    assert str(steered.steering.schedule).splitlines() == [
        "0: 0", "0.3125: 4 [hold]", "2.3125: 1", "30.3125: 2 [cut]", "60.3125: [end]",
    ]  # fmt: skip
    longer = Run(model, 4, read_schedule("0: 0\n1: [end]"), {4: ("4", "hold")})
    assert str(longer.steering.schedule).splitlines() == ["0: 0", "1.3125: 4 [hold]", "1.8125: [end]"]


def test_a_run_without_an_end_is_stopped_and_made_again_as_long_as_it_was(model):
    steered = Run(model, 10**6, said={3: ("3", "cut"), 5: ("4", "blend 3")}, stop_after=6)
    assert len(steered.state.records) == 6
    copied = steered.copied
    chunks = copied.chunks(SAMPLING, model.geometry)
    assert chunks == 6 and same(steered.state, Run(model, chunks, copied).state)


def test_frames_that_were_given_keep_the_prompt_that_they_entered_with(model):
    """What is said before there is a chunk begins with the second one."""
    given = torch.randn(1, 16, 2, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    early = Run(model, 4, said={1: ("4", "cut")}, given=given)
    assert str(early.steering.schedule).splitlines()[:2] == ["0: 0", "0.8125: 4 [cut]"]
    assert same(early.state, Run(model, 4, early.copied, given=given).state)


@pytest.mark.parametrize(
    ("text", "how", "message"),
    [
        ("", "", "there is no prompt"),
        ("   ", "cut", "there is no prompt"),
        ("a\x07b", "", r"has '\\x07' in it"),
        ("half \ud83d", "", r"has '\\ud83d' in it"),
        ("a" * 10_001, "", "at most 10,000 characters"),
        ("a", "melt", "is none of .hold."),
        ("a", "blend", "needs the number of chunks"),
        ("a", "blend 1", "from 2 to 100"),
        ("a", "slerp 101", "from 2 to 100"),
        ("a [cut]", "hold", "begins in one way, not in two"),
        ("a", "cut] [hold", "begins in one way"),
        ("a[5s]", "", "Infinity-RoPE"),
        ("a", "end", "is none of"),
    ],
)
def test_what_no_schedule_can_have_is_refused(model, text, how, message):
    plan = PLANNED.plan(SAMPLING, model.geometry, chunks=4)
    steering = Steering(plan, None, SAMPLING, CACHE)
    with pytest.raises(ValueError, match=message) as refused:
        steering.prompt(text, how)
    assert "the schedule, the prompt" not in str(refused.value)
    assert steering.schedule == plan.written()


@pytest.mark.parametrize(
    "text", ["a: b", "12: 30 people", "a / 5: b", "a face [close-up]", '"0": "b"', "{a}", "a | b", "1:2"]
)
def test_what_looks_like_a_schedule_comes_back_as_the_prompt_that_it_is(model, text):
    plan = PLANNED.plan(SAMPLING, model.geometry, chunks=4)
    steering = Steering(plan, None, SAMPLING, CACHE)
    steering.prompt(f"{text} []", "")
    segments = read_schedule(str(steering.schedule)).segments
    assert segments[1].text == text and segments == steering.schedule.segments


def test_brackets_of_the_text_count_where_nothing_else_says_how(model):
    steering = Steering(PLANNED.plan(SAMPLING, model.geometry, chunks=4), None, SAMPLING, CACHE)
    steering.prompt("a\n blue  circle [Cut]")
    assert str(steering.schedule).splitlines()[1] == "0.3125: a blue circle [cut]"
    steering.prompt("the newest one", "slerp 3")
    assert str(steering.schedule).splitlines()[1] == "0.3125: the newest one [slerp 3]"


def test_it_says_what_the_rules_can_do(model):
    plan = PLANNED.plan(SAMPLING, model.geometry, chunks=4)
    assert Steering(plan, None, SAMPLING, CACHE).words == ("", "hold", "recache", "flush", "cut")
    steering = Steering(plan, None, ROLLING, CacheConfig(6, sink=2))
    assert steering.words == ("", "hold")
    with pytest.raises(ValueError, match='switch must be "hold", got "cut"'):
        steering.prompt("a", "cut")
    closed = Steering(refusal="nobody knows the prompt")
    assert closed.words == () and closed.schedule is None
    with pytest.raises(ValueError, match="nobody knows the prompt"):
        closed.prompt("a")


def test_a_schedule_that_is_full_takes_no_more(model):
    lines = "\n".join(f"{number}: {number % 2}" for number in range(1000))
    steering = Steering(read_schedule(lines).plan(SAMPLING, model.geometry, chunks=10_000), None, SAMPLING, CACHE)
    with pytest.raises(ValueError, match="at most 1,000 prompts"):
        steering.prompt("a")


def test_a_prompt_that_cannot_be_encoded_changes_nothing(model):
    steered = Run(model, 5, said={3: ("no number", "cut")})
    assert same(steered.state, Run(model, 5).state)
    assert re.fullmatch('"no number" could not be encoded: invalid literal.*', steered.steering.failure)
    assert not steered.steering.changed and steered.copied == Run(model, 5).copied


def test_no_prompt_begins_behind_the_last_chunk(model):
    steering = Steering(
        PLANNED.plan(SAMPLING, model.geometry, chunks=2), lambda text: (prompt(model, 3), None), SAMPLING, CACHE
    )
    steering.prompt("3")
    assert steering.take(1)[1] == "3"
    with pytest.raises(ValueError, match="the last chunk of this run is being made"):
        steering.prompt("4")


def test_another_thread_pauses_goes_on_and_stops(model):
    steering, made = Steering(refusal="closed"), []
    heeded, wake = threading.Event(), threading.Event()
    steering.heed = heeded.set

    def run():
        for chunk in steering.heeded(iter(range(10)), 10):
            made.append(chunk)
            wake.set()
            if chunk == 1:
                steering.pause()

    thread = threading.Thread(target=run)
    thread.start()
    assert heeded.wait(30) and made == [0, 1] and steering.paused
    heeded.clear()
    wake.clear()
    assert heeded.wait(30) and made == [0, 1] and not wake.is_set()
    made.clear()
    steering.pause()
    steering.resume()
    thread.join(30)
    assert made == [*range(2, 10)] and not steering.changed


def test_a_paused_run_can_be_stopped_and_cancelled(model):
    stopped = Steering(refusal="closed")
    stopped.pause()
    stopped.heed = stopped.stop
    assert list(stopped.heeded(iter(range(10)), 10)) == [0] and stopped.changed

    def cancel():
        raise Cancelled

    cancelled = Steering(refusal="closed")
    cancelled.pause()
    cancelled.heed = cancel
    with pytest.raises(Cancelled):
        list(cancelled.heeded(iter(range(10)), 10))
    finished = Steering(refusal="closed")
    finished.pause()
    finished.heed = cancel
    assert list(finished.heeded(iter(range(1)), 1)) == [0]


def test_a_model_with_its_weights_in_cpu_memory_heeds_the_same(model):
    said = {2: ("3", "recache"), 4: ("4", "blend 2")}
    expected = Run(model, 5, said=said).state
    blocks = offload_blocks(model.transformer, "cpu")
    try:
        assert same(Run(model, 5, said=said).state, expected)
    finally:
        blocks.remove()
