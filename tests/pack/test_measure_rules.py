"""What is measured of the cache's rules: on made-up frames, and the page that tells of it."""

import json
from dataclasses import replace

import pytest
import torch

from tools.measure_rules import metrics, report, sample
from tools.measure_rules.rules import METHODS, SWITCHES
from tools.train_tiny.detector import detect
from tools.train_tiny.world import COLOURS, Scene, centre_of_mass, render, trajectory

SCENE = Scene("circle", "red", "right")
START = (12.0, 30.0)


def film(scene=SCENE, frames=17, **options):
    return render([scene], trajectory(scene, START, frames)[None], **options)[0]


def test_frames_until_the_new_colour_are_counted_to_where_it_stays():
    assert metrics.frames_until([True, True]) == 0
    assert metrics.frames_until([False, True, False, True, True]) == 3
    assert metrics.frames_until([True, True, False]) is None
    assert metrics.frames_until([False] + [True] * 19 + [False]) == 1  # the detector may err once


def test_a_shape_in_another_colour_or_gone_is_not_right():
    colours = torch.tensor([COLOURS["red"]] * 8 + [COLOURS["blue"]] * 9).float()[None]
    assert metrics.coloured(detect(film(colours=colours)), "blue") == [False] * 8 + [True] * 9
    assert not any(metrics.coloured(detect(torch.zeros(3, 4, 64, 64)), "red"))


@pytest.mark.parametrize("shape", ["circle", "triangle"])
@pytest.mark.parametrize("before_the_wall", [20, 5.5], ids=["on its way", "at a wall"])
def test_constant_motion_is_no_jump_even_where_a_wall_turns_it(before_the_wall, shape):
    scene = replace(SCENE, shape=shape)
    position = trajectory(scene, (64 - scene.margin - before_the_wall, 30.0), 17) + torch.tensor(centre_of_mass(scene))
    assert metrics.jump(position, 5, scene) < 0.01
    position[5:] += torch.tensor([3.0, 4.0])
    assert metrics.jump(position, 5, scene) == pytest.approx(5, abs=0.01)


def test_figures_of_a_switch_tell_the_late_from_those_that_never_come():
    position = trajectory(SCENE, START, 12).tolist()
    colours = [[False] * 6 + [True] * 6, [False] * 4 + [True] * 8, [True] * 11 + [False]]
    runs = [{"colour": colour, "shape": [True] * 12, "position": position, "passes": 2} for colour in colours]
    seen = metrics.switch_figures(runs, [SCENE] * 3, border=4, chunk=3)
    assert (seen["videos"], seen["never"], seen["frames"], seen["slowest"], seen["passes"]) == (3, 1, 1, 2, 2)
    assert seen["jump"] == seen["later"] == pytest.approx(0, abs=0.01)
    assert (seen["colour"], seen["shape"]) == (pytest.approx(21 / 24, abs=1e-3), 1)


def test_a_stretch_is_read_from_its_pixels():
    seen = metrics.stretch(detect(film()), SCENE)
    assert seen["colour"] == seen["shape"] == 1
    assert seen["speed"] == pytest.approx(1, abs=0.02)
    assert seen["size"] == pytest.approx(torch.pi * 8.5**2, rel=0.05)
    assert seen["brightness"] == pytest.approx(20, abs=0.5)  # (18 + 18 + 24) / 3
    assert metrics.stretch(detect(film()), replace(SCENE, colour="blue", shape="square"))["colour"] == 0


def test_drift_is_from_the_first_fifth_to_the_last():
    pieces = [
        {"size": 100.0 + 10 * index, "brightness": 20.0, "colour": 1, "shape": 1, "speed": 1} for index in range(10)
    ]
    assert metrics.drift(pieces, "size") == 80
    seen = metrics.long_figures([pieces, pieces])
    assert (seen["brightness"], seen["last"]) == (0, 1)
    assert seen["size"] == pytest.approx(100 * 80 / 105)


def test_an_interrupted_measurement_goes_on(monkeypatch, tmp_path):
    made = []

    def runs(bundled, rule, seeds, *_):
        for seed in seeds:
            made.append((rule.name, seed))
            yield {"rule": rule.name, "seed": seed}, torch.zeros(3, 2, 64, 64)

    monkeypatch.setattr(sample, "Bundled", lambda: None)
    monkeypatch.setattr(sample, "switch_runs", runs)
    sample.run("switch", tmp_path, [0, 1], 1, 60, ["hold"])
    sample.run("switch", tmp_path, [0, 1, 2], 5, 60, ["hold", "joint"])
    assert made == [("hold", 0), ("hold", 1), ("hold", 2), ("joint", 0), ("joint", 1), ("joint", 2)]
    assert [record["seed"] for record in sample.read(tmp_path / "switch.jsonl")] == [0, 1, 2, 0, 1, 2]


def test_rules_have_names_of_their_own_and_files_too():
    for rules in (METHODS, SWITCHES):
        assert len({sample.slug(rule.name) for rule in rules}) == len(rules)


def test_the_page_says_what_was_measured():
    measured = json.loads(report.MEASURED.read_text(encoding="utf-8"))
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.rewritten(page, measured) == page
    changed = json.loads(json.dumps(measured))
    changed["switch"]["hold"]["never"] += 1
    assert report.rewritten(page, changed) != page
    with pytest.raises(ValueError, match="switches"):
        report.rewritten(page.replace("measured: switches", ""), measured)
