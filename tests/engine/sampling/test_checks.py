"""What is said of a run before it begins."""

import json
import logging

import pytest

from rolling_kv.bundled import BUNDLED
from rolling_kv.checkpoints.detect import PRESET_FILE
from rolling_kv.checkpoints.model import load_model
from rolling_kv.config import ALL_FRAMES, CacheConfig, SamplingConfig
from rolling_kv.pipeline import Pipeline
from rolling_kv.sampling.checks import LONG_SINK_FRAMES, long_sink_note, size_note
from rolling_kv.tiny import make_tiny

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


def test_a_model_of_one_size_tells_so_at_another(tmp_path, caplog):
    pipeline = Pipeline.load(BUNDLED)
    with caplog.at_level(logging.WARNING):
        for width in (64, 96):
            pipeline.generate("a red circle", tmp_path / f"{width}.mp4", height=64, width=width, seconds=0.2)
    (record,) = caplog.records
    assert record.message == size_note(pipeline.model, 64, 96) != size_note(pipeline.model, 64, 64) == ""
    assert "64x64 pixels alone. At 96x64" in record.message and load_model(BUNDLED / "transformer").only_size == (
        64,
        64,
    )


def test_other_models_make_any_size(tmp_path):
    model = load_model(make_tiny(tmp_path / "tiny"))
    assert size_note(model, 64, 96) == ""


@pytest.mark.parametrize(
    "entry", [None, 64, [64], [64, "64"], [0, 64], [True, 64], {"height": 64}, [64, 64, 64], "no JSON"]
)
def test_a_size_that_is_none_says_nothing(entry, tmp_path):
    """And lets a model load that is told its preset; what lies beside the model's folder is not asked."""
    folder = make_tiny(tmp_path / "tiny")
    text = "{" if entry == "no JSON" else json.dumps({"only_size": entry})
    (folder / PRESET_FILE).write_text(text)
    (tmp_path / PRESET_FILE).write_text('{"only_size": [64, 64]}')
    assert load_model(folder, preset="self-forcing").only_size is None
