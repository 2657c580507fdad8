"""A preset comes from the file, from beside it, or from its name; what is wrong with it is said."""

import dataclasses
import json
import logging

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
        ("framewise/ar_diffusion.safetensors", "causal-multistep-framewise"),
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


@pytest.mark.parametrize(
    "name, preset",
    [
        ("LongLive-2.0-5B/model_bf16.pt", "longlive2"),
        ("longlive2.safetensors", "longlive2"),
        ("LongLive-2.0-5B-NVFP4-S4/model_te.pt", "longlive2"),
        ("LongLive-2.0-5B-NVFP4-S2/model_te.pt", "longlive2-2-step"),
        ("longlive2_2step_bf16.safetensors", "longlive2-2-step"),
        ("model.safetensors", None),
    ],
)
def test_models_with_the_latents_of_wan_2_2_are_longlive_2(name, preset, tmp_path):
    path = tmp_path / "models" / name
    path.parent.mkdir(parents=True)
    write_weights(
        path,
        {"generator": dict(tiny_transformer(in_channels=48, out_channels=48).state_dict())}
        if path.suffix == ".pt"
        else tiny_transformer(in_channels=48, out_channels=48).state_dict(),
    )
    info, model = inspect_checkpoint(path), load_model(path)
    assert info.preset == preset and model.preset == info.settings == PRESETS[preset or "longlive2"]
    assert ("treated as longlive2" in model.note) == (preset is None)


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


def test_a_file_beside_another_folder_is_not_asked(source, tmp_path):
    source.save_pretrained(tmp_path / "self-forcing")
    (tmp_path / "rolling_kv.json").write_text(json.dumps({"preset": CUSTOM.to_dict()}))
    assert load_model(tmp_path / "self-forcing").preset == PRESETS["self-forcing"]


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


@pytest.mark.parametrize(
    "name, said",
    [
        ("self_forcing_dmd.safetensors", ""),
        ("framewise/ar_diffusion.safetensors", ""),
        ("LongLive-1.3B/base.safetensors", ""),
        ("Wan2.1/self_forcing.safetensors", ""),
        ("wan2.1_t2v_1.3B_fp16.safetensors", "an ordinary Wan model"),
        ("Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", "an ordinary Wan model"),
        ("wan_causvid.safetensors", "nothing in the file or its name tells"),
        ("causal_ode.safetensors", "before its distillation"),
        ("model.safetensors", "nothing in the file or its name tells"),
    ],
)
def test_what_is_assumed_is_said(name, said, weights, tmp_path, caplog):
    path = tmp_path / "models" / name
    path.parent.mkdir(parents=True)
    write_weights(path, weights)
    with caplog.at_level(logging.WARNING, logger="rolling_kv"):
        model = load_model(path)
    assert model.note == inspect_checkpoint(path).note
    if said:
        assert said in model.note and model.note in caplog.text
        assert "treated as self-forcing (chunks of 3, window 21, 4 steps). Choose the preset" in model.note
    else:
        assert model.note == caplog.text == ""
    assert load_model(path, preset="longlive").note == ""


def test_a_model_that_tells_needs_no_note(weights, tmp_path):
    path = tmp_path / "wan2.1_t2v.safetensors"
    save_file(weights, path, {"rolling_kv": json.dumps({"preset": CUSTOM.to_dict()})})
    assert load_model(path).note == ""
    save_file(weights, path, {"config": json.dumps({"transformer": {"causal_ar": True}})})
    assert load_model(path).note == ""
