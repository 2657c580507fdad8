"""The benchmark of the step caches measures what it says: skipped work, and likeness to the uncached video."""

import argparse
import json
import math

import pytest
import torch

pytest.importorskip("torchmetrics")

from rolling_kv.bench import caching
from rolling_kv.bench.caching_report import similarity
from rolling_kv.step_cache import METHODS
from rolling_kv.tiny import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("bench") / "tiny")


def arguments(folder, *more):
    parser = argparse.ArgumentParser()
    caching.add_arguments(parser)
    small = ["--height", "32", "--width", "48", "--steps", "6", "--chunks", "1", "--device", "cpu"]
    return parser.parse_args(["--model", str(folder), *small, *more])


def test_every_method_has_at_least_two_strengths():
    counts = [sum(method.name == name for _, method in caching.variants((1.0, 1.0))) for name in METHODS]
    assert min(counts) >= 2


def test_similarity_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(3, 5, 32, 32, generator=generator) * 1.6 - 0.8
    assert similarity(video, video)["psnr"] == math.inf
    shifted = similarity(video + 0.2, video)  # 0.1 of the range
    assert shifted["psnr"] == pytest.approx(20, abs=0.01)
    assert 0.5 < shifted["ssim"] < similarity(video, video)["ssim"] == pytest.approx(1)


def test_one_run_measures_calibrates_and_writes(folder, tmp_path, capsys):
    report = tmp_path / "caching.json"
    options = ["--methods", "magcache,taylorseer", "--json", str(report)]
    caching.main(arguments(folder, *options), judge=lambda frames: {"frames": float(frames.shape[1])})
    written = json.loads(report.read_text())
    assert len(written["mag_ratios"]) == 6
    plain, *others = written["results"]
    assert plain["method"] == "none" and plain["psnr"] is None and plain["extra"] == {"frames": 9.0}
    assert {result["method"] for result in others} == {"MagCache", "TaylorSeer"}
    for result in others:
        assert result["ssim"] < 1 and 10 < result["psnr"] < 100
        assert result["peak_bytes"] > 0 and result["report"]["computed"]["feed-forward"] < 6 * 2 * 4
    assert "| TaylorSeer" in capsys.readouterr().out


def test_few_step_says_why_not(folder, capsys):
    caching.main(arguments(folder, "--mode", "few-step", "--methods", "taylorseer", "--no-memory"))
    assert "From one of the 4 steps to the next the prediction changes by" in capsys.readouterr().out


def test_what_cannot_work_is_said_first(folder, tmp_path):
    with pytest.raises(ValueError, match="--methods takes pab"):
        caching.main(arguments(folder, "--methods", "teacache"))
    with pytest.raises(ValueError, match="--videos must be at least 1"):
        caching.main(arguments(folder, "--videos", "0"))
    with pytest.raises(ValueError, match="does not exist"):
        caching.main(arguments(folder, "--json", str(tmp_path / "no" / "f.json")))
