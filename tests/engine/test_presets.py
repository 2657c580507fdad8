"""Presets: what file names tell, and what the published settings are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import DATA, load_cases

from rolling_kv.checkpoints.detect import detect_preset
from rolling_kv.checkpoints.readers import Checkpoint
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.presets import CUT_MARKERS, PRESETS, ModelPreset
from rolling_kv.sampling.schedule import flow_schedule, warp_steps


@pytest.mark.parametrize(
    "path, name",
    [
        ("Causal-Forcing++/framewise-2step.pt", "causal-forcing++-2-step"),
        ("causal_forcing_pp_1_step.safetensors", "causal-forcing++-1-step"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("chunkwise/causal_forcing.pt", "causal-forcing-chunkwise"),
        ("longlive_base.pt", "longlive"),
        ("Self_Gradient_Forcing/chunkwise/ar/model.pt", "self-gradient-forcing-chunkwise"),
        ("framewise/ar/model.pt", "self-gradient-forcing-framewise"),
        ("chunkwise/ar/model.pt", "self-gradient-forcing-chunkwise"),
        ("self_gradient_forcing_framewise.safetensors", "self-gradient-forcing-framewise"),
        ("self_gradient_forcing/model.pt", "self-gradient-forcing-chunkwise"),
        ("sgf_plus_chunkwise.safetensors", "self-gradient-forcing-plus-chunkwise"),
        ("Self_Gradient_Forcing_Plus/framewise/model.pt", "self-gradient-forcing-plus-framewise"),
        ("Self_Gradient_Forcing/init/chunkwise/ar_diffusion.pt", "causal-multistep"),
        ("opsdv_longlive_merged.pt", "opsd-v-longlive"),
        ("opsdv_self_forcing_merged.safetensors", "opsd-v-self-forcing"),
        ("shotstream_merged.pt", "shotstream"),
        ("MemFlow/base.pt", "memflow"),
        ("diadistill_base.pt", "diagdistill"),
        ("rewardforcing.pt", "reward-forcing"),
        ("rolling_forcing_dmd.pt", "rolling-forcing"),
        ("chunkwise/longvideo.pt", "causal-forcing-long"),
        ("Causal-Forcing/chunkwise/longvideo.pt", "causal-forcing-long"),
        ("krea-realtime-video-14b.safetensors", "krea-realtime"),
        ("self_forcing_dmd.pt", "self-forcing"),
        ("model.pt", None),
    ],
)
def test_names_tell(path, name):
    preset = detect_preset(Path(path), Checkpoint((Path(path),), {}))
    assert (preset and preset.name) == name


def test_a_second_set_of_weights_tells():
    tensors = dict.fromkeys(["blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.memory_weight"], torch.zeros(1))
    for path, name in (("framewise/model.pt", "framewise"), ("chunkwise/model.pt", "chunkwise"), ("x.pt", "chunkwise")):
        preset = detect_preset(Path(path), Checkpoint((Path(path),), tensors))
        assert preset is PRESETS[f"self-gradient-forcing-plus-{name}"]


def test_rules_for_other_models_weights_are_never_told_by_a_name():
    assert not any(PRESETS[name].names for name in ("deep-sink", "memrope", "longlive-infinity"))


def test_published_settings():
    longlive, fast = PRESETS["longlive"], PRESETS["causal-forcing++-2-step"].sampling
    assert longlive.cache == CacheConfig(12, sink=3, switch="joint")
    assert PRESETS["longlive-infinity"].cache == replace(longlive.cache, positions="window")
    assert (fast.chunk, fast.steps_at(0), fast.steps_at(1)) == (1, (1000, 750, 500, 250), (1000, 500))
    assert [fast.passes_at(frame) for frame in (0, 1, 5)] == [4, 2, 2]


@pytest.mark.parametrize(
    "name, cache",
    [
        ("deep-sink", CacheConfig(21, sink=10, positions="window")),
        ("memrope", CacheConfig(12, sink=3, positions="window", leaving="memory", memory_alphas=(0.01, 0.1))),
        ("reward-forcing", CacheConfig(9, sink=3, positions="window", leaving="ema", ema_alpha=0.999)),
        ("rolling-forcing", CacheConfig(21, sink=3)),
        ("causal-forcing-long", CacheConfig(21, sink=3)),
        ("krea-realtime", CacheConfig(6, positions="window", context="recomputed")),
        ("self-gradient-forcing-chunkwise", CacheConfig(12, sink=3, positions="window", span=21)),
        ("self-gradient-forcing-framewise", CacheConfig(21, sink=4, positions="window")),
        ("self-gradient-forcing-plus-chunkwise", CacheConfig(12, sink=3, positions="window")),
        ("opsd-v-longlive", CacheConfig(12, sink=3, positions="window", switch="joint")),
        ("opsd-v-self-forcing", CacheConfig(12, sink=3, positions="window")),
    ],
)
def test_published_cache_rules(name, cache):
    assert PRESETS[name].cache == cache
    assert cache.accumulate == "float32"


@pytest.mark.parametrize(
    "name",
    ["memrope", "longlive", "longlive-infinity", "reward-forcing", "krea-realtime", "self-gradient-forcing-chunkwise"]
    + ["rolling-forcing", "opsd-v-longlive", "opsd-v-self-forcing", "longlive2"],
)
def test_a_preset_has_the_settings_with_which_its_family_was_recorded(name):
    preset = PRESETS[name]
    wanted = (preset.cache, preset.sampling.chunk, preset.sampling.denoising_steps, preset.sampling.shift)
    recorded = [(case.cache(), case.sampling()) for case in load_cases(preset.compared, folder=DATA) if not case.quirk]
    assert wanted in [(cache, each.chunk, each.denoising_steps, each.shift) for cache, each in recorded]


def test_every_chunk_has_the_steps_of_its_number():
    sampling = PRESETS["diagdistill"].sampling
    steps = [(1000, 736, 354, 100), (1000, 736, 100), (1000, 100), (1000, 100)]
    assert [sampling.steps_at(frame) for frame in (0, 3, 6, 300)] == steps
    assert sampling.steps_at(1) == steps[1]  # after a given image
    warped = [step.timestep for step in warp_steps(steps[0], sampling.shift)]
    assert warped == pytest.approx([1000, 933, 733, 357], abs=0.5)
    assert replace(sampling, first_chunk_steps=[[1000], [500]]).first_chunk_steps == ((1000,), (500,))


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("name", ["diagdistill", "causal-forcing++-2-step", "self-forcing", "causal-multistep"])
def test_passes_are_counted_chunk_by_chunk(name, independent, start):
    sampling = replace(PRESETS[name].sampling, independent_first_frame=independent)
    for chunks in range(1, 6):
        frames, passes = start, chunks - 1
        for size in sampling.chunk_sizes(chunks, start):
            passes, frames = passes + sampling.passes_at(frames), frames + size
        assert sampling.passes_for(chunks, start) == passes
    assert sampling.passes_for(10**12, start) - sampling.passes_for(10**12 - 1, start) == sampling.passes + 1


def test_the_last_step_may_be_the_end_of_the_schedule():
    sampling = PRESETS["krea-realtime"].sampling
    steps = warp_steps(sampling.denoising_steps, sampling.shift)
    assert [step.timestep for step in steps] == pytest.approx([1000, 937.5, 833.333, 625, 0], abs=1e-3)
    timesteps, sigmas = flow_schedule(sampling.shift)
    assert steps[-1].timestep == 0.0 and steps[-1].sigma == sigmas[-1] == pytest.approx(0.00498, abs=1e-5)


def test_the_rules_are_told_in_words():
    told = PRESETS["reward-forcing"].trained_for()
    assert told == (
        "chunks of 3, window 9 with a sink of 3, positions in the window, what leaves averaged into the sink, 4 steps"
    )
    words = {
        "krea-realtime": "window 6, positions in the window, recomputed before every chunk, 5 steps",
        "longlive": "window computed anew at a switch",
        "memrope": "what leaves averaged into 2 memory frames",
        "self-gradient-forcing-chunkwise": "positions in the window that end at 21",
        "diagdistill": "2 steps, 4 and 3 for the first chunks",
        "shotstream": "4 steps, shift 8",
        "rolling-forcing": "5 steps of as many chunks at once",
    }
    assert all(text in PRESETS[name].trained_for() for name, text in words.items())


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_go_together_and_say_where_they_are_from(preset):
    preset.cache.check_chunk(preset.sampling.chunk)
    preset.sampling.check_cache(preset.cache)
    assert preset.title and preset.files and preset.licence
    assert preset.source.startswith(("https://github.com/", "https://arxiv.org/"))
    assert all(file.url.startswith("https://huggingface.co/") for file in preset.files)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(window=12, sink=10), r"window of 12 .* sink \(10\) and a chunk \(3\): make the window at least 13"),
        (dict(window=9, sink=2, leaving="ema"), "sink is 2 latent frames and a chunk is 3: make the sink 3"),
        (dict(window=10, sink=3, leaving="ema"), "window of 10 .* nearest windows are 9 and 12"),
        (dict(window=12, positions="window", span=9), "span of 9 .* window of 12"),
        (dict(leaving="memory"), '"memory" needs "window" positions'),
        (dict(sampler="rolling", positions="window"), 'positions must be "absolute", got "window"'),
        (dict(first_chunk_steps=[[1000], [0]]), r"only the last of several may be 0, got \[0\]"),
    ],
)
def test_rules_that_do_not_fit_are_refused_where_they_are_read(values, message):
    with pytest.raises(ValueError, match=message):
        ModelPreset.from_dict({"name": "mine"} | values)


def test_published_settings_of_longlive_2():
    four, two = PRESETS["longlive2"], PRESETS["longlive2-2-step"]
    assert (
        four.cache
        == two.cache
        == CacheConfig(32, sink=8, switch="hold", cut_flush=False, cut_offset=8, shot_sink=True, shot_clean=False)
    )
    assert (four.sampling.passes, two.sampling.passes) == (4, 2)
    assert four.sampling == SamplingConfig(
        chunk=8, sampler="unipc", num_inference_steps=4, shift=5.0, given_frame="in chunk"
    )
    assert four.cut_marker == two.cut_marker == "The scene transitions. " and CUT_MARKERS == (four.cut_marker,)
    with pytest.raises(ValueError, match="the cut marker of a preset is a text"):
        ModelPreset.from_dict({"cut_marker": 3})


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_survive_json(preset):
    assert ModelPreset.from_dict(preset.to_dict()) == preset
    assert ModelPreset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


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
        (dict(first_chunk_steps=((1000, 500), (500, 1000))), "must fall"),
        (dict(first_chunk_steps=((1000,), 500)), "must fall"),
        (dict(denoising_steps=(1000, 0, 0)), "must fall"),
        (dict(denoising_steps=(0,)), "only the last of several may be 0"),
        (dict(sampler="magic"), "sampler must be one of renoise, rolling, unipc, euler, got 'magic'"),
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


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_the_chunks_that_a_source_has_room_for_are_the_most(start, independent):
    config = SamplingConfig(chunk=3, independent_first_frame=independent)
    for frames in range(20):
        chunks = config.chunks_within(frames, start)
        assert config.frames_of(chunks, start) <= frames < config.frames_of(chunks + 1, start)
