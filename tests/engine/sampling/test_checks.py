"""What is said of a run before it begins."""

import pytest

from rolling_kv.config import ALL_FRAMES, CacheConfig, SamplingConfig
from rolling_kv.sampling.checks import LONG_SINK_FRAMES, long_sink_note

SAMPLING = SamplingConfig()


def test_a_long_video_with_a_sink_at_absolute_positions_is_told():
    cache = CacheConfig(12, sink=3)
    assert long_sink_note(SAMPLING, cache, LONG_SINK_FRAMES) == ""
    note = long_sink_note(SAMPLING, cache, LONG_SINK_FRAMES + 1)
    assert "121 latent frames" in note and '"window" positions' in note


@pytest.mark.parametrize(
    "cache", [CacheConfig(12, sink=3, positions="window"), CacheConfig(12), CacheConfig(ALL_FRAMES)]
)
def test_other_rules_have_nothing_to_tell(cache):
    assert long_sink_note(SAMPLING, cache, 100_000) == ""


def test_an_anchor_that_moves_along_has_nothing_to_tell():
    rolling = SamplingConfig(sampler="rolling")
    assert long_sink_note(rolling, CacheConfig(21, sink=3), 100_000) == ""
