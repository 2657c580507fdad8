"""The report: its parts run here at the tiny size, what ends one costs nothing else, and what is known so far is on disk."""

import argparse
import json
import subprocess
import sys

import pytest
import stand_in_part

from rolling_kv.bench import cli as bench_cli
from rolling_kv.bench.figures import revision
from rolling_kv.bench.report import cli, run
from rolling_kv.bench.report.parts import Part, parts_of
from rolling_kv.bench.report.run import DONE, run_parts
from rolling_kv.cli import main
from tools.comfyui.env import PACK

QUICK = parts_of("tiny", "cpu", 9, quick=True)
SLOW = {"compiled", "cases"}
"""tests/engine/wan/test_compile.py and test_conformance.py run those."""


def arguments(command):
    parser = argparse.ArgumentParser()
    bench_cli.add_command(parser.add_subparsers())
    return parser.parse_args(["bench", *command])


@pytest.mark.parametrize("part", [part for part in QUICK if part.name not in SLOW], ids=lambda part: part.name)
def test_each_part_runs_at_the_tiny_size_and_has_a_headline(part, tmp_path, capsys):
    args = arguments([*part.command, "--json", str(tmp_path / "figures.json")])
    args.run(args)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"]["torch"] and figures["machine"]["revision"] == revision()
    line = part.headline(figures)
    assert line and "\n" not in line and len(line) < 250


def test_the_parts_of_a_card_are_in_the_order_of_worth_and_their_options_are_those_of_the_commands():
    parts = parts_of("1.3B", "cuda", 21)
    names = [part.name for part in parts]
    assert names[:5] == ["kernels", "pass", "methods", "cases", "decode"] and len(set(names)) == len(names)
    assert names[5:8] == ["pipeline", "pipeline_tiny", "pipeline_nvenc"]
    on_a_cpu = {part.name for part in parts_of("tiny", "cpu", 9)}
    assert not on_a_cpu & {"14B", "14B_float8", "720p", "pipeline_nvenc", "graphs"} and on_a_cpu < set(names)
    for name in (
        "compiled",
        "graphs",
        "fast",
        "cache_int8",
        "weights_float8",
        "window_12",
        "window_6",
        "14B",
        "offloaded",
    ):
        assert name in names
    for part in parts:
        if "graphs" not in part.name:  # it asks for a CUDA device
            assert callable(arguments(part.command).run)
        assert 0 < part.limit <= 150
    assert {part.name for part in QUICK} < set(names)


def test_a_case_that_differs_is_told_with_its_name():
    cases = next(part for part in QUICK if part.name == "cases")
    figures = {"cases": [{"name": "a", "difference": 1e-6}, {"name": "b", "difference": 2e-3}]}
    assert cases.headline(figures) == "2 cases, at most 2.0e-03 off (b)"


def part(name, limit=60.0):
    return Part(name, (name,), limit, lambda figures: f"saw {figures['seen']}")


def test_what_ends_a_part_costs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_work", stand_in_part.work)
    parts = [part("fails"), part("hangs", limit=5.0), part("crashes"), part("fails late"), part("works")]
    told = []
    outcomes = run_parts(parts, tmp_path, 600, ["--device", "cpu"], lambda one, outcome: told.append(outcome.name))
    assert told == [one.name for one in parts]
    assert [outcome.status for outcome in outcomes] == [
        "failed: ValueError: too small", "ended after 5 s", "crashed (signal 11)", "failed: ValueError: too small", DONE,
    ]  # fmt: skip
    assert outcomes[4].figures == {"seen": ["--device", "cpu"]} == outcomes[3].figures and outcomes[0].figures is None
    assert outcomes[4].command == "python -m rolling_kv bench works --device cpu"
    rows = cli.table(parts, outcomes)
    assert "failed: ValueError: too small; saw" in rows[5] and "| ended after 5 s " in rows[3]


def test_what_no_time_is_left_for_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_run", lambda *_: pytest.fail("it was begun"))
    (outcome,) = run_parts([part("works")], tmp_path, run.LEAST - 1, [], lambda *_: None)
    assert outcome.status.startswith("left out") and outcome.figures is None


def test_the_command_writes_every_figure_and_prints_the_table_last(tmp_path, capsys):
    main(f"bench report --quick --parts kernels --threads 1 --out {tmp_path / 'out'}".split())
    out = capsys.readouterr().out
    assert out.index("| kernels") > out.index("kernels: ") and "All figures are in" in out
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    (kernels,) = written["parts"]
    assert written["machine"]["torch"] and written["quick"] and kernels["status"] == DONE
    assert kernels["figures"] == json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert "matrix products" in (tmp_path / "out" / "kernels.txt").read_text()


def test_ctrl_c_tells_what_is_known_so_far(tmp_path, capsys, monkeypatch):
    def stopped(parts, folder, seconds, given, told):
        told(parts[0], run.Outcome(parts[0].name, "python -m", "failed: no", 1.0, None))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_parts", stopped)
    main(f"bench report --threads 1 --size tiny --out {tmp_path}".split())
    assert "| kernels | failed: no " in capsys.readouterr().out and (tmp_path / "report.json").is_file()


def test_unknown_parts_and_no_time_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kernels, pass.*got speed"):
        cli.chosen(QUICK, ["speed"])
    for minutes in ("0", "inf"):
        with pytest.raises(SystemExit, match="--minutes must be positive"):
            main(f"bench report --minutes {minutes} --out {tmp_path}".split())


def test_it_needs_neither_pyav_nor_gguf(tmp_path):
    """Whatever makes no video file goes without them: many machines with a GPU have torch and little else."""
    without = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
hidden = lambda name, path=None, target=None: None if name in ("av", "gguf") else find(name, path, target)
importlib.machinery.PathFinder.find_spec = hidden
from rolling_kv.cli import main
for command in sys.argv[1:]:
    main(["bench", *command.split()])
"""
    parts = [part for part in QUICK if part.name in ("kernels", "pass")]  # the parser has imported what the others use
    assert len(parts) == 2
    commands = [f"{' '.join(part.command)} --json {tmp_path / part.name}.json" for part in parts]
    ended = subprocess.run([sys.executable, "-c", without, *commands], cwd=PACK, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for part in parts:
        assert part.headline(json.loads((tmp_path / f"{part.name}.json").read_text()))


def test_the_revision_of_a_checkout_and_of_a_worktree(tmp_path):
    assert revision(tmp_path) == ""
    git = tmp_path / "one" / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc refs/heads/main\n")
    assert revision(tmp_path / "one") == "abc"
    (git / "refs/heads/main").write_text("def\n")
    assert revision(tmp_path / "one") == "def"
    (git / "worktrees/two").mkdir(parents=True)
    (git / "worktrees/two/HEAD").write_text("ref: refs/heads/main\n")
    (git / "worktrees/two/commondir").write_text("../..\n")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/.git").write_text(f"gitdir: {git / 'worktrees/two'}\n")
    assert revision(tmp_path / "two") == "def"
    (git / "HEAD").write_text("123\n")
    assert revision(tmp_path / "one") == "123"
    assert revision() == revision(PACK)
