"""The benchmarks of the VAE and of the whole way: the ways decode the same frames, and the parts are those of the video."""

import json

import pytest
import torch

from rolling_kv.bench.decode import cli
from rolling_kv.bench.decode.run import STOCK, DecodeExperiment, measure
from rolling_kv.bench.pipeline import run as pipeline_run
from rolling_kv.bench.pipeline.run import PipelineExperiment, RandomTexts
from rolling_kv.bench.random_model import random_model, random_prompt, random_taehv, random_vae
from rolling_kv.cli import main
from rolling_kv.pipeline import Pipeline
from rolling_kv.vae.wan import WanVAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured():
    experiment = DecodeExperiment(
        random_vae("tiny", torch.float32, CPU), random_taehv(torch.float32, CPU), 16, 32, repeats=2
    )
    return experiment, measure(experiment, say=lambda text: None)


def test_every_way_decodes_the_same_frames(measured):
    _, results = measured
    assert [result.way for result in results] == [STOCK, "channels last", "streamlined", "tiny"]
    assert all(len(result.times) == 2 and result.peak > 0 and result.kernels.launches for result in results)
    assert results[0].difference == 0
    assert max(result.difference for result in results[:3]) < 1e-4 < results[3].difference


def test_what_is_announced_is_enough(measured):
    experiment, results = measured
    assert all(result.announced == WanVAE(experiment.vae).decode_bytes(16, 32) for result in results[:3])
    assert all(result.peak < result.announced for result in results[:3]) and results[3].announced is None


def test_the_stock_vae_is_left_alone(measured):
    experiment, _ = measured
    assert not any("forward" in vars(module) for module in experiment.vae.modules())


def test_the_true_width_is_that_of_wan():
    with torch.device("meta"):
        vae = random_vae("full", torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}


def test_the_command_writes_every_figure(tmp_path, capsys):
    main(f"bench decode --height 16 --width 16 --repeats 1 --json {tmp_path / 'd.json'}".split())
    out = capsys.readouterr().out
    assert "VAE of width 8, random weights" in out and "| streamlined" in out and "convolution" in out
    ways = json.loads((tmp_path / "d.json").read_text())["ways"]
    assert [way["way"] for way in ways] == [STOCK, "channels last", "streamlined", "tiny"]
    assert ways[0]["times_the_first"] == 1 and ways[0]["seconds"] > 0 and ways[0]["kernels"]["launches"]


def test_the_pipeline_makes_the_video_that_its_parts_are_of(monkeypatch):
    texts = RandomTexts(random_prompt(torch.float32, CPU))
    pipeline = Pipeline(random_model("tiny", torch.float32, CPU), texts, WanVAE(random_vae("tiny", torch.float32, CPU)))
    written = []

    class Writer(pipeline_run.VideoWriter):
        def write(self, frames):
            written.append(len(frames))
            super().write(frames)

    monkeypatch.setattr(pipeline_run, "VideoWriter", Writer)
    result = pipeline_run.measure(PipelineExperiment(pipeline, 32, 32, chunks=2))
    assert result.frames == 21 and sum(written) == 9 + 21
    assert list(result.parts) == ["text", "sampling", "decoding", "encoding"]
    assert 0 < result.first_frame < result.whole and result.frames_per_second == 21 / result.whole
    assert sum(result.shares.values()) == pytest.approx(1) and min(result.parts.values()) >= 0
    assert cli.VAE_SIZES["full"] == 96


def test_a_pipeline_may_decode_with_a_tiny_decoder_and_tells_which_encoder_was_there(tmp_path, capsys):
    file = tmp_path / "p.json"
    main(f"bench pipeline --size tiny --tiny-decoder --encoder hevc_nvenc --chunks 1 --json {file}".split())
    figures = json.loads(file.read_text())
    assert figures["frames"] == 9 and figures["first_frame"] > 0
    assert figures["encoder"] == "x264", "pictures of 64 pixels are too small for any GPU's encoder"
    assert "encoded with x264" in capsys.readouterr().out
