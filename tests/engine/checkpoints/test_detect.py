"""A preset comes from the file, from beside it, or from its name; what is wrong with it is said."""

import dataclasses
import json

import pytest
from builders import tiny_transformer, write_weights
from safetensors.torch import save_file

from rolling_kv.checkpoints.model import load_model
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.inspection import inspect_checkpoint
from rolling_kv.presets import PRESETS, ModelPreset

CUSTOM = ModelPreset("mine", SamplingConfig(chunk=2, shift=3.0), CacheConfig(10, sink=2))


@pytest.fixture(scope="module")
def source():
    return tiny_transformer()


@pytest.fixture(scope="module")
def weights(source):
    return source.state_dict()


@pytest.mark.parametrize(
    "name, preset",
    [
        ("self_forcing_dmd.safetensors", "self-forcing"),
        ("Causal-Forcing-framewise.safetensors", "causal-forcing-framewise"),
        ("chunkwise/causal_forcing.safetensors", "causal-forcing-chunkwise"),
        ("framewise/causal_forcing.safetensors", "causal-forcing-framewise"),
        ("chunkwise/ar_diffusion.safetensors", "causal-multistep"),
        ("framewise/ar_diffusion.safetensors", None),
        ("longlive_base.safetensors", "longlive"),
        ("longlive/self_forcing.safetensors", "self-forcing"),
        ("LongLive-1.3B/base.safetensors", "longlive"),
        ("krea-realtime-video-14b.safetensors", "krea-realtime"),
        ("Reward-Forcing.safetensors", "reward-forcing"),
        ("model.safetensors", None),
        ("causal_forcing.safetensors", None),
    ],
)
def test_presets_are_known_by_file_name(name, preset, weights, tmp_path):
    path = tmp_path / "models" / name
    path.parent.mkdir(parents=True)
    write_weights(path, weights)
    assert inspect_checkpoint(path).preset == preset
    assert load_model(path).preset == PRESETS[preset or "self-forcing"]


def test_presets_are_read_from_metadata(weights, tmp_path):
    path = tmp_path / "longlive.safetensors"
    save_file(weights, path, {"rolling_kv": json.dumps({"preset": CUSTOM.to_dict()})})
    assert load_model(path).preset == CUSTOM
    assert inspect_checkpoint(path).preset == "mine"
    assert load_model(path, preset="krea-realtime").preset == PRESETS["krea-realtime"]
    other = dataclasses.replace(CUSTOM, name="other")
    assert load_model(path, preset=other).preset == other

    comfyui = tmp_path / "wan.safetensors"
    save_file(weights, comfyui, {"config": json.dumps({"transformer": {"causal_ar": True}})})
    assert load_model(comfyui).preset == PRESETS["causal-forcing-framewise"]


@pytest.mark.parametrize("place", [".", "transformer"])
@pytest.mark.parametrize("level", [".", "transformer"])
def test_presets_are_read_from_a_file_in_or_beside_the_folder(place, level, source, tmp_path):
    source.save_pretrained(tmp_path / "transformer")
    (tmp_path / place / "rolling_kv.json").write_text(json.dumps({"preset": CUSTOM.to_dict()}))
    assert load_model(tmp_path / level).preset == CUSTOM


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"preset": {"chunk": 0}}', "chunk must be at least 1"),
        ('{"preset": {"chunks": 3}}', "unknown preset entries: chunks"),
        ('{"preset": {"chunk": "3"}}', "not usable"),
        ('{"chunk": 3}', 'no entry "preset"'),
        ("{", "not valid JSON"),
        ("[]", "JSON object, not a list"),
    ],
)
def test_a_wrong_preset_file_is_explained(content, message, source, tmp_path):
    source.save_pretrained(tmp_path)
    (tmp_path / "rolling_kv.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"rolling_kv.json.*{message}"):
        load_model(tmp_path)


def test_an_unknown_preset_or_dtype_lists_the_choices(weights, tmp_path):
    path = write_weights(tmp_path / "a.safetensors", weights)
    with pytest.raises(ValueError, match="self-forcing, .*got 'fast'"):
        load_model(path, preset="fast")
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got 'fp4'"):
        load_model(path, dtype="fp4")
