"""The benchmark of the live preview: every way makes the same video, and those with pictures make them of every chunk."""

import argparse
import json

import pytest
from videos import HEIGHT, WIDTH, prompt, small_model

from rolling_kv.bench.figures import BenchError
from rolling_kv.bench.preview import cli, run
from rolling_kv.bench.preview.experiment import PreviewExperiment
from rolling_kv.bench.preview.run import PreviewResult
from rolling_kv.cli import main
from rolling_kv.previews import LinearPreview


def setting(**changes):
    model = small_model()
    preview = LinearPreview([[0.1, 0.2, 0.3]] * model.geometry.channels, [0.0] * 3)
    given = dict(name="test", model=model, prompt=prompt(model), preview=preview, height=HEIGHT, width=WIDTH)
    return PreviewExperiment(**given | dict(chunks=3, repeats=2) | changes)


def test_every_way_is_measured_as_often_and_pictures_are_made_of_every_chunk():
    results = run.measure(setting(), say=lambda text: None)
    assert [result.way for result in results] == ["none", "linear", "frames"]
    assert all(len(result.seconds) == len(result.cpu_seconds) == 2 for result in results)
    assert [len(result.strip_bytes) for result in results] == [0, 6, 6]
    assert min(results[2].strip_bytes) > max(results[1].strip_bytes) > 0


def test_the_frames_are_as_many_as_the_video_has():
    experiment = setting()
    with experiment.session(experiment.model) as session:
        for chunk, count in zip(session.generate(2), (5, 8)):
            linear, frames = (make(session.state, chunk.start_frame) for make in list(experiment.ways().values())[1:])
            assert linear.shape[0] == 2 and frames.shape == (count, HEIGHT, WIDTH, 3)


def test_pictures_that_cannot_be_made_are_no_measurement(monkeypatch):
    monkeypatch.setattr(LinearPreview, "pictures", lambda *_: 1 / 0)
    with pytest.raises(BenchError, match="a picture could not be made"):
        run.measure(setting(), say=lambda text: None)


def test_the_table_has_ratios_of_the_same_turn():
    results = [
        PreviewResult("none", [1.0, 2.0], [1.0, 1.0]),
        PreviewResult("linear", [1.1, 2.0], [1.0, 1.5], [51_200] * 3),
    ]
    row = cli.summary(results)[1]
    assert (
        row["times_the_first"] == pytest.approx(1.05)
        and row["cpu_times_the_first"] == 1.25
        and row["strip_bytes"] == 51_200
    )
    assert "| linear   | 1.55 | 1.050           | 1.000 to 1.100     | 1.250       | 51.2 kB        |" in cli.table(
        results
    )


def test_a_model_that_makes_chunks_together_is_refused():
    model = small_model()
    model.preset = argparse.Namespace(
        sampling=argparse.Namespace(guided=True, joint=False, check_cache=lambda cache: None), cache=model.preset.cache
    )
    with pytest.raises(ValueError, match="one chunk after the other"):
        setting(model=model)


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path, capsys):
    command = [
        "bench",
        "preview",
        "--size",
        "tiny",
        "--chunks",
        "2",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "a.json"),
    ]
    main(command)
    out = capsys.readouterr().out
    assert "2 chunks of 3 latent frames, float32" in out and "| linear" in out
    written = json.loads((tmp_path / "a.json").read_text())
    assert [row["way"] for row in written["summary"]] == ["none", "linear", "frames"]
    assert [len(way["strip_bytes"]) for way in written["ways"]] == [0, 2, 2]
