"""Settings as values: their defaults, what they say of themselves, and which of them go together."""

from dataclasses import astuple

import pytest
import torch

from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.geometry import GEOMETRIES, WAN_21, WAN_22, geometry_of
from rolling_kv.platforms import Platform


def test_defaults_are_those_of_self_forcing():
    assert astuple(CacheConfig())[:5] == (21, 0, "absolute", "model", False)
    assert astuple(CacheConfig())[5:11] == (None, "drop", 0.999, (0.01, 0.1), "float32", "hold")
    assert astuple(CacheConfig())[11:] == (True, True, 42, False, False, "kept")
    assert astuple(SamplingConfig()) == (
        3,
        False,
        "renoise",
        (1000, 750, 500, 250),
        None,
        50,
        5.0,
        1.0,
        0.0,
        "own chunk",
    )
    assert astuple(ExecutionConfig()) == (False, None, False, False, False, False)


def test_a_window_is_a_number_of_frames_or_all():
    assert (CacheConfig(7).limit, CacheConfig(7).unlimited) == (7, False)
    assert (CacheConfig(ALL_FRAMES).limit, CacheConfig(ALL_FRAMES).unlimited) == (None, True)
    CacheConfig(ALL_FRAMES, sink=3).check_chunk(100)
    CacheConfig(6, sink=3).check_chunk(3)


def test_a_span_goes_with_the_positions_that_it_came_with():
    trained = CacheConfig(12, sink=3, positions="window", span=21)
    assert trained.with_rules(sink=6) == CacheConfig(12, sink=6, positions="window", span=21)
    assert trained.with_rules(positions="window") == CacheConfig(12, sink=3, positions="window")
    assert trained.with_rules(positions="absolute") == CacheConfig(12, sink=3)
    assert trained.with_rules(positions="window", span=15).span == 15


def test_what_is_not_the_default_is_described():
    assert ExecutionConfig().describe() == []
    everything = ExecutionConfig(exact=True, backend="native", compile=True, cuda_graphs=True)
    assert everything.describe() == ["exact", "compiled", "CUDA graphs", "attention by native"]


@pytest.mark.parametrize(
    "execution, given, message",
    [
        (ExecutionConfig(), dict(weight_storage="int4"), "weight storage must be one of model, float8, got 'int4'"),
        (ExecutionConfig(), dict(weight_storage="float8", packings=["Q8_0"]), "keeps its own packing"),
        (ExecutionConfig(exact=True), dict(device="mps"), "turn exact off"),
        (ExecutionConfig(compile=True), dict(step_cache=True), "turn compile off"),
        (ExecutionConfig(cuda_graphs=True), dict(step_cache=True), "turn them off"),
        (ExecutionConfig(cuda_graphs=True), dict(device="cpu"), "CUDA graphs need a CUDA device"),
        (ExecutionConfig(cuda_graphs=True), dict(device="cuda", packings=["Q4_K"]), "packed as Q4_K"),
        (ExecutionConfig(backend="flesh"), {}, "attention backend must be one of native, .* got 'flesh'"),
    ],
)
def test_what_does_not_go_together_is_refused(execution, given, message):
    with pytest.raises(ValueError, match=message):
        execution.check(**given)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_flash_attention_3_is_refused_where_it_would_end_the_process(capability, monkeypatch):
    monkeypatch.setattr("rolling_kv.config.execution.platform_of", lambda device: Platform("cuda", capability))
    monkeypatch.setattr("rolling_kv.config.execution._check_attention_backend_requirements", lambda backend: None)
    ExecutionConfig(backend="flash").check("cuda")
    if capability <= (9, 0):
        ExecutionConfig(backend="_flash_3").check("cuda")
    else:
        with pytest.raises(
            ValueError, match="_flash_3 has kernels for GPUs up to H100.*end the process: choose another"
        ):
            ExecutionConfig(backend="_flash_3").check("cuda")


@pytest.mark.parametrize("capability, compiles", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_float8_is_compiled_where_compiled_code_knows_it(capability, compiles, monkeypatch):
    monkeypatch.setattr("rolling_kv.config.execution.platform_of", lambda device: Platform("cuda", capability))
    if compiles:
        ExecutionConfig(compile=True).check("cuda", weight_storage="float8")
    else:
        with pytest.raises(ValueError, match='on cuda: .* RTX 40.*Turn compile off.*"model"'):
            ExecutionConfig(compile=True).check("cuda", weight_storage="float8")


@pytest.mark.parametrize(
    "execution, given",
    [
        (ExecutionConfig(), dict(device="cpu", weight_storage="float8", step_cache=True)),
        (ExecutionConfig(exact=True, backend="native"), dict(device="cpu", step_cache=True)),
        (ExecutionConfig(exact=True), dict(device=torch.device("cuda"))),
        (ExecutionConfig(compile=True), dict(device="cpu", packings=["Q4_K"])),
        (ExecutionConfig(compile=True), dict(device="cpu", weight_storage="float8")),
        (ExecutionConfig(cuda_graphs=True), dict(device="cuda", weight_storage="float8")),
        (ExecutionConfig(compile=True, cuda_graphs=True), dict(device="cuda", packings=["Q8_0", "BF16"])),
        (ExecutionConfig(cuda_graphs=True), {}),
    ],
)
def test_what_goes_together_is_not(execution, given):
    execution.check(**given)


def test_geometry_of_wan_2_1():
    assert (WAN_21.channels, WAN_21.spatial, WAN_21.temporal, WAN_21.fps, WAN_21.multiple) == (16, 8, 4, 16, 16)
    assert WAN_21.latent_size(480, 832) == (60, 104)
    assert WAN_21.pixel_size(60, 104) == (480, 832)
    assert (WAN_21.grid(60, 104), WAN_21.tokens_per_frame(60, 104), WAN_21.cells_per_token) == ((30, 52), 1560, 4)
    assert [WAN_21.pixel_frames(frames) for frames in (0, 1, 2, 21)] == [0, 1, 5, 81]
    assert [WAN_21.latent_frames(frames) for frames in (0, 1, 2, 5, 6, 81)] == [0, 1, 2, 2, 3, 21]
    assert WAN_21.seconds(21) == 81 / 16
    assert geometry_of(16) is WAN_21 and list(GEOMETRIES) == [16, 48]
    with pytest.raises(ValueError, match="have 16 or 48 channels, got 12"):
        geometry_of(12)


def test_geometry_of_wan_2_2():
    """Wan 2.2's VAE: 16x16x4, 24 frames per second."""
    other = geometry_of(48)
    assert other is WAN_22 and (other.channels, other.spatial, other.temporal, other.fps) == (48, 16, 4, 24)
    assert other.size == (704, 1280)
    assert other.multiple == 32 and other.latent_size(704, 1280) == (44, 80)
    assert other.tokens_per_frame(44, 80) == 880
    assert other.latent_frames_for(1.0) == 7 and other.latent_frames_for(1.0, after=7) == 6
    assert SamplingConfig(chunk=2).chunks_for_seconds(1.0, geometry=other) == 4
    with pytest.raises(
        ValueError, match="height must be a multiple of 32 pixels, got 720; the nearest are 704 and 736"
    ):
        other.latent_size(720, 1280)


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_length_is_positive(seconds):
    with pytest.raises(ValueError, match="length must be positive"):
        WAN_21.latent_frames_for(seconds)
