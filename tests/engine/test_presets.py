"""Presets: what file names tell, and what the published settings are."""

from pathlib import Path

import pytest

from rolling_kv.checkpoints.detect import detect_preset
from rolling_kv.checkpoints.readers import Checkpoint
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.presets import PRESETS, ModelPreset


@pytest.mark.parametrize(
    "path, name",
    [
        ("Causal-Forcing++/framewise-2step.pt", "causal-forcing++-2-step"),
        ("causal_forcing_pp_1_step.safetensors", "causal-forcing++-1-step"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("chunkwise/causal_forcing.pt", "causal-forcing-chunkwise"),
        ("longlive_base.pt", "longlive"),
        ("krea-realtime-video-14b.safetensors", "krea-realtime"),
        ("self_forcing_dmd.pt", "self-forcing"),
        ("model.pt", None),
    ],
)
def test_names_tell(path, name):
    preset = detect_preset(Path(path), Checkpoint((Path(path),), {}))
    assert (preset and preset.name) == name


def test_published_settings():
    longlive, fast = PRESETS["longlive"], PRESETS["causal-forcing++-2-step"].sampling
    assert longlive.cache == CacheConfig(12, sink=3)
    assert (fast.chunk, fast.steps_at(0), fast.steps_at(1)) == (1, (1000, 750, 500, 250), (1000, 500))
    assert [fast.passes_at(frame) for frame in (0, 1, 5)] == [4, 2, 2]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_survive_json(preset):
    assert ModelPreset.from_dict(preset.to_dict()) == preset


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("independent", [False, True])
def test_lengths_in_seconds_are_the_fewest_chunks_that_reach_them(chunk, independent):
    config = SamplingConfig(chunk=chunk, independent_first_frame=independent)
    for start in range(8):
        for frames in range(1, 60):
            chunks = config.chunks_for_seconds(frames / 16, start)

            def made(count, start=start):
                frames = start + sum(config.chunk_sizes(count, start))
                return WAN_21.pixel_frames(frames) - WAN_21.pixel_frames(start)

            assert config.frames_of(chunks, start) == sum(config.chunk_sizes(chunks, start))
            assert made(chunks) >= frames and (chunks == 1 or made(chunks - 1) < frames)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(denoising_steps=(500, 1000)), "must fall from at most 1000"),
        (dict(denoising_steps=()), "must fall"),
        (dict(first_chunk_steps=(1200,)), "must fall"),
        (dict(sampler="magic"), "sampler must be one of renoise, unipc, euler, got 'magic'"),
        (dict(chunk=0), "chunk must be at least 1"),
        (dict(shift=0), "shift must be positive"),
        (dict(context_noise=1001), "timestep from 0 to 1000"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be a number from 0 to 1000, got nan"),
        (dict(guidance_scale=-3.0), "guidance_scale must be a number from 0 to 1000"),
        (dict(guidance_scale=1e300), "guidance_scale must be a number from 0 to 1000"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e9, 1e300])
def test_lengths_that_are_none_are_refused(seconds):
    with pytest.raises(ValueError, match="the length must be"):
        SamplingConfig().chunks_for_seconds(seconds)


def test_the_frames_of_any_number_of_chunks_are_told_at_once():
    config = SamplingConfig(independent_first_frame=True)
    assert (config.frames_of(0), config.frames_of(10**12), config.frames_of(10**12, 1)) == (
        0,
        3 * 10**12 - 2,
        3 * 10**12,
    )
    assert next(iter(config.chunk_sizes(10**12))) == 1
