"""What the benchmarks of several processes and of several videos print, and the paper model in the documentation."""

import argparse
import json

import pytest

from rolling_kv.bench.random_model import SIZES
from rolling_kv.bench.ranks import paper
from rolling_kv.bench.ranks.cli import add_arguments, make_experiment
from rolling_kv.bench.ranks.formula import sent
from rolling_kv.cli import main
from tools.comfyui.env import PACK


def rows(printed):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")
    ][2:]


def test_two_processes_send_what_the_formula_counts_and_hold_half(tmp_path, capsys):
    """The mid model has 4 heads."""
    main(["bench", "ranks", "--size", "mid", "--height", "32", "--width", "64", "--chunks", "4", "--device", "cpu",
          "--json", str(tmp_path / "f.json")])  # fmt: skip
    one, two = rows(capsys.readouterr().out)
    assert (one[0], two[0]) == ("1", "2") and two[3] == two[4] != "0.00"
    told = json.loads((tmp_path / "f.json").read_text())["results"]
    assert told[0]["cache"] == 2 * told[1]["cache"] and told[1]["error"] < 1e-5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ranks", "3"], "4 heads .* take one of 1, 2, or"),
        (["--ranks", "0"], "at least 1, got 0"),
        (["--height", "100"], "height must be a multiple of 16"),
    ],
)
def test_counts_that_cannot_share_are_refused(given, said):
    with pytest.raises(SystemExit, match=said):
        main(["bench", "ranks", "--size", "mid", "--device", "cpu", *given])


def test_a_count_that_is_given_twice_is_measured_once():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert make_experiment(parser.parse_args(["--device", "cpu", "--ranks", "2", "1", "2"])).ranks == (1, 2)


def test_videos_together_are_those_one_by_one(capsys):
    main(["bench", "streams", "--size", "tiny", "--streams", "1", "2", "--chunks", "2", "--repeats", "1", "--device", "cpu"])  # fmt: skip
    one, two = rows(capsys.readouterr().out)
    assert one[4] == two[4] != "0.00" and float(two[5]) < 1e-5


def test_the_paper_model_in_the_documentation_is_the_code_s():
    assert paper.tables().split("\n\n")[0] in (PACK / "docs/scale.md").read_text()
    assert paper.tables().split("\n\n")[1] in (PACK / "docs/scale.md").read_text()


def test_the_paper_model_is_made_of_what_processes_send():
    size = SIZES["1.3B"]
    card = paper.CARDS[0]._replace(link=1.0, delay=0.0)
    tokens = 3 * 30 * 52
    assert paper.chunk_of(size, card, 2).sending == 4 * sent(size, tokens, 2, 2).all + sent(size, tokens, 2, 2, keys_only=True).all  # fmt: skip
    assert paper.weight_bytes(size) == pytest.approx(2.6e9, rel=0.1)  # 1.3 billion, of two bytes
