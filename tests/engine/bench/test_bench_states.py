"""The benchmark of states: every way makes the same video, in the runs and passes that it names."""

import argparse
import json
import re

import pytest
import torch
from videos import HEIGHT, WIDTH, prompt, small_model

from rolling_kv.bench.figures import BenchError
from rolling_kv.bench.states import cli, report, run
from rolling_kv.bench.states.experiment import WAYS, StateExperiment
from rolling_kv.bench.states.run import FileResult, ForkResult, Results, WayResult
from rolling_kv.bench.subject import beside
from rolling_kv.cli import main
from rolling_kv.sampling.session import RollingSession


def setting(**changes):
    model = small_model()
    given = dict(
        name="test", model=model, prompt=prompt(model), height=HEIGHT, width=WIDTH, chunks=5, runs=3, repeats=2
    )
    return StateExperiment(**given | changes)


def quiet(_):
    pass


@pytest.fixture
def passes(monkeypatch):
    """Passes of every session that was open, in the order in which they were opened."""
    counted = []
    original = RollingSession.__init__

    def watched(self, *arguments, **settings):
        counted.append(0)
        number = len(counted) - 1

        def on_pass(*_):
            counted[number] += 1

        original(self, *arguments, **settings, on_pass=on_pass)

    monkeypatch.setattr(RollingSession, "__init__", watched)
    return counted


@pytest.mark.parametrize("way", WAYS, ids=[way.title for way in WAYS])
def test_the_passes_are_those_that_are_made(way, passes):
    experiment = setting()
    states = list(way.video(experiment, experiment.model))
    assert [len(state.chunks) for state in states] == [1, 2, 3, 4, 5]
    assert len(passes) == (3 if way.chained else 1) and sum(passes) == run._passes(experiment, way)


def test_every_way_is_measured_as_often_and_a_fork_and_its_files():
    experiment = setting()
    results = run.measure(experiment, say=quiet)
    assert [result.way for result in results.ways] == list(WAYS)
    timed = [result.seconds for result in results.ways] + [result.cpu_seconds for result in results.ways]
    timed += [results.fork.first, results.fork.second]
    for file in results.files:
        timed += [file.save_seconds, file.load_seconds]
    assert all(len(seconds) == 2 and min(seconds) >= 0 for seconds in timed)
    ours, asked = results.files
    assert (ours.height, ours.width, asked.height, asked.width) == (HEIGHT, WIDTH, 480, 832)
    assert ours.frames == asked.frames == 10
    assert asked.latent_bytes == 10 * 16 * 60 * 104 * 4 and asked.prompt_bytes == experiment.prompt.nbytes
    for file in results.files:
        assert 0 < file.file_bytes - file.latent_bytes - file.prompt_bytes < 8192
    assert report.frame_bytes(asked) == (asked.latent_bytes + asked.prompt_bytes) / 10
    described = report.tables(experiment, results)
    assert re.search(r"\| chain, taken over +\| 14 ", described) and "480x832" in described


def test_another_video_is_found(monkeypatch):
    original = StateExperiment.session

    def forgetful(self, model, state=None, *rest):
        return original(self, model, None if state is not None and len(state.chunks) == 3 else state, *rest)

    monkeypatch.setattr(StateExperiment, "session", forgetful)
    with pytest.raises(BenchError, match="chain, taken over is not the video that one run makes"):
        run.measure(setting(), say=quiet)


def test_models_share_their_weights():
    model = small_model()
    other = beside(model)
    assert other.transformer is not model.transformer and other.identity == model.identity
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert ours is theirs


def test_ratios_are_those_of_the_same_turn():
    first, other = (WayResult(way, [*seconds], [*seconds]) for way, seconds in zip(WAYS, ([1, 10, 2], [2, 11, 2.2])))
    rows = report.summary(Results([first, other], ForkResult(), []))
    assert rows[0]["times_the_first"] == 1 and rows[1]["times_the_first"] == pytest.approx(1.1)
    assert (rows[1]["least"], rows[1]["most"]) == (pytest.approx(1.1), 2)
    assert report.frame_bytes(FileResult(1, 1, 4, 100, 20, 0)) == 30


def test_a_chain_is_cut_into_runs_of_about_the_same_length():
    assert setting(chunks=10, runs=5).lengths(5) == [2] * 5
    assert setting(chunks=7, runs=3).lengths(3) == [2, 2, 3]
    with pytest.raises(ValueError, match="number of runs must be at most 3, got 4"):
        setting(chunks=3, runs=4)


def test_from_the_command_line(tmp_path, capsys):
    written = tmp_path / "states.json"
    with torch.inference_mode(False):
        main(
            [
                "bench",
                "states",
                "--size",
                "tiny",
                "--chunks",
                "2",
                "--runs",
                "2",
                "--repeats",
                "1",
                "--json",
                str(written),
            ]
        )
    printed = capsys.readouterr().out
    assert "chain, taken over" in printed and "per latent frame" in printed
    content = json.loads(written.read_text())
    assert [row["way"] for row in content["summary"]] == [way.title for way in WAYS]
    assert content["files"][-1]["bytes_per_latent_frame"] > 0


def test_models_that_it_cannot_compare_are_refused():
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(ValueError, match="choose another --preset"):
        cli.make_experiment(parser.parse_args(["--preset", "krea-realtime"]))
    with pytest.raises(ValueError, match="--repeats must be at least 1, got 0"):
        cli.main(parser.parse_args(["--repeats", "0"]))
