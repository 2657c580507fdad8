"""Each example runs as it stands, on the bundled model, and does what it says."""

import runpy
import shutil

import pytest
import torch

from rolling_kv import Pipeline, RollingSession
from rolling_kv.bundled import BUNDLED
from rolling_kv.video import read_video_info
from tools.comfyui.env import PACK

EXAMPLES = PACK / "docs" / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example in an empty folder that holds the bundled model; returns its names."""
    shutil.copytree(BUNDLED, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_minimal(run):
    run("minimal")
    info = read_video_info("circle.mp4")
    assert (info.width, info.height) == (384, 384)
    assert info.frames >= 2 * info.fps


def test_two_prompts(run):
    names = run("two_prompts")
    assert read_video_info("two_prompts.mp4").frames == 4 * 4 * names["pipeline"].model.preset.sampling.chunk - 3
    assert [record.prompt for record in names["session"].state.records] == [0, 0, 1, 1]


def test_resume(run, capsys):
    assert run("resume")["resumed"].frames == 4 * 3
    assert "12 latent frames" in capsys.readouterr().out


def test_hooks(run):
    video = run("hooks")["video"]
    pipeline = Pipeline.load("models/tiny")
    prompt = pipeline.text_encoder.encode(["a blue triangle moving right"])
    with RollingSession(pipeline.model, prompt, height=64, width=64) as session:
        expected = [chunk.latents for chunk in session.generate(len(video), seed=1)]
    torch.testing.assert_close(torch.cat(video), torch.cat(expected), atol=1e-3, rtol=0)


def test_shared_by_a_single_process(run):
    assert run("shared")["shards"] is None
    assert read_video_info("shared.mp4").frames >= 2 * read_video_info("shared.mp4").fps


def test_streams(run):
    run("streams")
    for name in ("first.mp4", "second.mp4"):
        info = read_video_info(name)
        assert (info.width, info.frames) == (384, 33)  # of nine latent frames


def test_all_examples_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "minimal",
        "two_prompts",
        "resume",
        "hooks",
        "shared",
        "streams",
    }
