"""What the schedule editor is told: every form in seconds, chunks where the engine has them, and a text that reads the same."""

import pytest

from rolling_kv.config import SamplingConfig
from rolling_kv.geometry import WAN_21, WAN_22
from rolling_kv.schedules.reading import read_schedule
from rolling_kv.schedules.timeline import MOST_GRID, shown_in_seconds

SAMPLING = SamplingConfig()


def shown(text, seconds=None, sampling=SAMPLING, geometry=WAN_21):
    return shown_in_seconds(text, sampling, geometry, seconds)


def times(read):
    return [segment.time for segment in read.schedule.segments]


def test_a_text_in_seconds_keeps_the_times_that_are_written_in_it():
    text = "0: a\n2.5: b [cut]\n6: c [blend 3]\n10: [end]"
    read = shown(text)
    assert read.canonical and str(read.schedule) == text
    assert read.grid[:4] == (0, 0.5625, 1.3125, 2.0625) and read.grid[14] == read.seconds == 10.3125
    assert [part["how"] for part in read.about()["segments"]] == ["", "cut", "blend 3"]
    assert not shown("a red circle").canonical


@pytest.mark.parametrize(
    "text, expected",
    [
        ('"0": "a", "24": "b"', [0, 2.0625]),
        ('"8": "a", "24": "b"', [0.5625, 2.0625]),
        ("a[5s] | b[10s#] | c[4s]", [0, 4.3125, 14.0625]),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [40]}', [0, 10.3125]),
        ('{"prompts": ["a", "b"], "times": [0, 2.5]}', [0, 2.5]),
    ],
)
def test_other_forms_are_in_seconds_and_mean_the_same(text, expected):
    read = shown(text)
    assert not read.canonical and times(read) == expected
    before, now = read_schedule(text), read_schedule(str(read.schedule))
    assert now.segments == read.schedule.segments
    if not before.begins_later:
        plans = [schedule.plan(SAMPLING, chunks=20).begins for schedule in (before, now)]
        assert [number for number, _ in plans[0]] == [number for number, _ in plans[1]]


def test_shares_are_those_of_the_run():
    assert times(shown("a | b | c", 30.0)) == [0, 10.3125, 20.8125]
    assert times(shown("a | b | c")) == [0, 2.0625, 3.5625]


def test_what_has_no_end_is_as_long_as_the_run_and_never_shorter_than_its_prompts():
    assert shown("0: a\n2: b").seconds == 7.3125
    assert shown("0: a\n2: b", 30.0).seconds == 30.5625
    assert shown("0: a\n40: b", 30.0).seconds > 40
    assert shown("0: a\n4: [end]", 30.0).seconds == 4.3125


@pytest.mark.parametrize(
    "sampling, geometry, second",
    [
        (SAMPLING, WAN_22, 0.375),
        (SamplingConfig(chunk=1), WAN_21, 0.0625),
        (SamplingConfig(chunk=4, independent_first_frame=True), WAN_21, 0.0625),
    ],
)
def test_the_grid_is_where_the_model_begins_its_chunks(sampling, geometry, second):
    read = shown("0: a\n1: b\n3: [end]", sampling=sampling, geometry=geometry)
    assert read.grid[1] == second
    starts = [read_schedule(f"0: a\n{time}: b").plan(sampling, geometry, chunks=999).begins for time in read.grid[1:]]
    assert [begins[1][0] for begins in starts] == list(range(1, len(read.grid)))


def test_a_year_is_shown_with_a_bounded_grid():
    read = shown("0: a\n31000000: b")
    assert len(read.grid) == MOST_GRID and read.seconds > 31_000_000


def test_prompts_that_share_a_chunk_are_told_of_and_kept():
    read = shown("0: a\n0.1: b\n0.2: c")
    assert times(read) == [0, 0.1, 0.2] and any("Left out" in note for note in read.notes)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "5", True])
def test_a_run_lasts_a_number_of_seconds(seconds):
    with pytest.raises(ValueError, match="seconds must be a number"):
        shown("a", seconds)
