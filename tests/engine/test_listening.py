"""Steering from a terminal and from Python: what is typed comes into the video, and the printed schedule makes it again."""

import io
import re

import pytest

from rolling_kv.cli import main
from rolling_kv.listening import listen
from rolling_kv.sampling.state_file import read_state
from rolling_kv.sampling.steering import Steering
from rolling_kv.tiny import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


def generate(folder, output, *arguments):
    main(
        ["generate", "--model", str(folder), "--output", str(output), "--width", "32", "--height", "32", *arguments,
         "--state-out", str(output.with_suffix(".safetensors"))]
    )  # fmt: skip
    return read_state(output.with_suffix(".safetensors"))


def test_what_is_typed_comes_into_the_video_and_the_printed_schedule_makes_it_again(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO("/melt\n\na blue circle [melt]\na blue  circle [cut]\n"))
    steered = generate(folder, tmp_path / "steered.mp4", "--prompt", "a red circle", "--seconds", "3", "--steer")
    said = capsys.readouterr()
    assert "/melt is none of /pause, /resume, /stop" in said.out and "[melt] is none of" in said.out
    assert "from the next chunk on: a blue circle." in said.out
    schedule = said.out[said.out.index("0: a red circle") :]
    assert re.fullmatch(r"0: a red circle\n\d\.\d+: a blue circle \[cut\]\n", schedule)
    assert steered.texts == ("a red circle", "a blue circle")
    again = generate(folder, tmp_path / "again.mp4", "--schedule", schedule, "--seconds", "3")
    assert again.key == steered.key


def test_a_run_without_an_end_stops_well(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/pause\n/resume\n/stop\n"))
    stopped = generate(
        folder, tmp_path / "stopped.mp4", "--prompt", "a red circle", "--seconds", "0", "--window", "6", "--steer"
    )
    assert (tmp_path / "stopped.mp4").exists() and len(stopped.records) >= 1
    schedule = capsys.readouterr().out.split("the same video:\n")[1]
    assert generate(folder, tmp_path / "again.mp4", "--schedule", schedule, "--window", "6").key == stopped.key


def test_commands_pause_and_go_on():
    steering, said = Steering(refusal="closed."), []
    listen(["/pause\n"], steering, said.append)
    assert steering.paused
    listen(["/resume", "/stop", "a dog"], steering, said.append)
    assert not steering.paused and steering.stopped and said[-1] == "closed."
