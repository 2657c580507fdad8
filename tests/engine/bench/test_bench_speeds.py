"""What each speed costs in error: measured against the recordings, with the roundings of what a CPU does not have."""

import json

import pytest
import torch
from cases import load_cases

from rolling_kv.bench.speeds import cli, run
from rolling_kv.bench.speeds.imitation import attention_in_8_bits, fast_passes
from rolling_kv.bench.speeds.run import SPEEDS, SpeedResult, measure
from rolling_kv.cli import main
from rolling_kv.config import ExecutionConfig
from rolling_kv.wan import fast, processors


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [(130, 200), (64, 64), (5, 7)])
def test_attention_in_8_bits_is_attention_to_its_rounding(tokens):
    queries, keys = tokens
    query, key, value = some(2, queries, 3, 32), some(2, keys, 3, 32, seed=1) + 4, some(2, keys, 3, 32, seed=2)
    made = attention_in_8_bits(query, key, value)
    wide = (heads.transpose(1, 2) for heads in (query, key, value))
    plain = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    error = (made - plain).norm() / plain.norm()
    assert made.shape == plain.shape and 1e-3 < error < 0.06


def test_fast_passes_have_what_is_asked_for_and_it_goes_with_them():
    before = fast.fast_on, processors.dispatch_attention_fn
    with pytest.raises(KeyError), fast_passes(products=True, attention=True):
        assert fast.fast_on(torch.device("cpu"), torch.bfloat16, 64, None, False) == (None, True, "")
        assert processors.dispatch_attention_fn is not before[1]
        raise KeyError
    assert (fast.fast_on, processors.dispatch_attention_fn) == before
    with fast_passes(products=False, attention=False):
        assert processors.dispatch_attention_fn is before[1]


@pytest.fixture
def one_case(monkeypatch):
    case = next(case for case in load_cases("self-forcing") if case.dtype == "float32" and not case.quirk)
    monkeypatch.setattr(run, "recorded", lambda families: [case])


@pytest.mark.usefixtures("one_case")
def test_each_speed_is_another_rounding(tmp_path, capsys):
    main(["bench", "speeds", "--videos", "0", "--json", str(tmp_path / "speeds.json")])
    told = json.loads((tmp_path / "speeds.json").read_text())
    exact, standard, _, half, products, attention, both, flash, all_float8 = (
        speed["largest"] for speed in told["speeds"]
    )
    assert exact < 1e-5 and standard < 1e-5 < half < min(products, attention) and max(products, attention) < 0.1
    assert half < both < 0.1 and len({products, attention, both}) == 3
    assert half < flash < min(0.03, all_float8) and all_float8 < 0.1 and flash != attention != all_float8
    assert "| fast: both " in capsys.readouterr().out and told["machine"]["torch"]


def result(speed, largest=0.5):
    return SpeedResult(*speed.key, 0.25, largest, "case", {})


def bench(file, *options):
    main(["bench", "speeds", "--videos", "0", "--json", str(file), *options])
    return [speed["name"] for speed in json.loads(file.read_text())["speeds"]]


def test_a_run_that_is_cut_short_keeps_what_it_measured_and_the_next_one_goes_on(monkeypatch, tmp_path, capsys):
    file, made = tmp_path / "speeds.json", []

    def measured(families, videos, device, say, speeds):
        for speed in speeds:
            if len(made) == 2:
                made.append("")
                raise KeyboardInterrupt
            made.append(speed.key)
            yield result(speed)

    monkeypatch.setattr(cli, "measure", measured)
    assert bench(file) == ["exact", "standard"] and "| standard | float32 |" in capsys.readouterr().out
    names = [speed.name for speed in SPEEDS]
    assert bench(file) == names and made == [*(s.key for s in SPEEDS[:2]), "", *(s.key for s in SPEEDS[2:])]
    assert "2 speeds are in" in capsys.readouterr().out
    assert bench(file) == names and len(made) == 10
    assert bench(file, "--families", "longlive", "--speeds", "fast") == names[4:] and len(made) == 15
    assert bench(file, "--families", "longlive", "--speeds", "exact") == ["exact", "exact", *names[4:]]
    file.write_text('[{"speeds": 1}]')
    assert bench(file, "--speeds", "standard") == ["standard", "standard"]


def test_a_run_that_is_ended_before_it_has_anything_writes_nothing(monkeypatch, tmp_path):
    def measured(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure", measured)
    with pytest.raises(SystemExit, match="cancelled; nothing was written"):
        bench(tmp_path / "speeds.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_case")
def test_videos_of_the_bundled_model_are_looked_at(monkeypatch):
    monkeypatch.setattr(run, "SPEEDS", SPEEDS[-1:])
    (result,) = measure([], 1, "cpu", lambda text: None)
    assert list(result.seen) == ["shape is there", "colour right", "shape right", "direction right"]
    assert result.seen["shape is there"] > 0.9 and SPEEDS[-1].execution == ExecutionConfig(fast=True)


def test_a_number_of_videos_that_is_none_is_refused():
    with pytest.raises(SystemExit, match="--videos takes a number from 0 on, got -1"):
        main(["bench", "speeds", "--videos", "-1"])
