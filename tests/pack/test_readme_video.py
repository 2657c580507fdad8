"""The video of the README: its story is a schedule of words that the bundled model knows, and shows each way of switching."""

from rolling_kv.bundled import BUNDLED
from rolling_kv.schedules.reading import read_schedule
from rolling_kv.words import read_words
from tools import steered


def test_the_story_is_a_schedule_of_known_words():
    schedule = read_schedule(steered.schedule())
    assert str(schedule) == steered.schedule()
    assert read_words(BUNDLED).unknown(" ".join(prompt for _, prompt, _ in steered.STORY)) == []


def test_it_begins_with_chunks_as_the_pipeline_counts_them():
    assert [steered.seconds(chunk) for chunk in (0, 1, 5)] == [0, 9 / 16, 57 / 16]
