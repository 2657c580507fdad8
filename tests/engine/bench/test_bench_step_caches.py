"""The benchmark of the step caches measures what it says: skipped work, and likeness to the uncached video."""

import argparse
import json
import math
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rolling_kv.bench.chart import Axis, draw, ticks
from rolling_kv.bench.step_caches import cli, experiment, run, similarity
from rolling_kv.bench.step_caches.experiment import Candidate
from rolling_kv.bench.step_caches.report import change_note, plot, table
from rolling_kv.bench.step_caches.similarity import Similarity
from rolling_kv.bundled import BUNDLED
from rolling_kv.config import ExecutionConfig
from rolling_kv.sampling.memory import estimate
from rolling_kv.step_cache import METHODS, FasterCache, StepCacheReport, TaylorSeer, seacache
from rolling_kv.tiny import make_tiny
from tools.bench_caching import judge_of
from tools.train_tiny.world import Scene, random_start, render, trajectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("bench") / "tiny")


def arguments(folder, *more):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    small = ["--height", "32", "--width", "48", "--steps", "6", "--chunks", "1", "--device", "cpu"]
    return parser.parse_args(["--model", str(folder), *small, *more])


@pytest.fixture
def setting(folder):
    return cli.make_experiment(arguments(folder, "--no-memory"))[0]


def random_video():
    return torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


# -- which methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
def test_every_method_has_at_least_two_strengths_one_of_them_its_defaults(guided):
    constants = {name: (1.0, 1.0) for name, method in METHODS.items() if method.constants}
    known = experiment.candidates(METHODS, guided, constants=constants)
    for name in METHODS:
        settings = [method for *_, method in known if method.name == name]
        assert len(settings) == len(set(settings)) >= 2
        assert sum(method.is_default for method in settings) == 1, name
    if not guided:  # what concerns the unconditional branch is not read then
        ranges = [m.spatial_attention_timestep_skip_range for *_, m in known if isinstance(m, FasterCache)]
        assert len(ranges) == len(set(ranges))


def test_what_cannot_run_is_left_out_unless_it_was_asked_for(monkeypatch):
    monkeypatch.delattr(seacache.hooks, "SeaCacheConfig", raising=False)
    names, notes = experiment.applicable()
    assert names == [name for name in METHODS if name != "seacache"] and "diffusers 0.42" in notes[0]
    with pytest.raises(ValueError, match="SeaCache needs diffusers 0.42"):
        experiment.applicable(["taylorseer", "seacache"])
    assert experiment.applicable(["taylorseer", "pab"]) == (["pab", "taylorseer"], [])
    with pytest.raises(ValueError, match="got teacache"):
        experiment.applicable(["teacache"])


# -- runs --------------------------------------------------------------------------------------------------------------


def test_progress_counts_every_pass_of_every_run(setting):
    seen = []
    setting = replace(setting, seeds=(0, 1), memory=True)
    results, _ = run.measure(setting, ["taylorseer"], on_pass=lambda *pair: seen.append(pair))
    passes = 6 * (1 + 2 + 3 * 4 + 4)  # the first run; uncached twice; three strengths with a pair per seed; memory
    before = 6 * 4  # without a step cache
    assert seen[:before] == [(index, passes) for index in range(before)]
    assert seen[before : before + 6] == [(before, passes)] * 6, "the untimed run of the method does not count"
    assert seen[before + 6 :] == [(index, passes) for index in range(before, passes)]
    assert results[1].report.possible["feed-forward"] == 2 * 6 * 2 * 4, "of both seeds"
    assert [len(result.seconds) for result in results] == [2] * 4


def test_defaults_only_and_settings_of_ones_own(setting):
    mine = TaylorSeer(2, disable_cache_before_step=1)
    results, ratios = run.measure(
        setting, ["firstblock"], defaults_only=True, more=[Candidate("mine", "every 2", mine)]
    )
    assert [(r.method, r.strength) for r in results] == [
        ("none", ""), ("First Block Cache", "threshold 0.05"), ("mine", "every 2")
    ]  # fmt: skip
    assert not ratios and results[2].report.skipped("feed-forward") == 0.5


def attributes(transformer):
    """Names of what is set on each module: hooks and replaced methods would show."""
    return {
        name: {key for key, value in vars(module).items() if value is not None}
        for name, module in transformer.named_modules()
    }


@pytest.mark.parametrize("mode", ["multi-step", "bidirectional"])
def test_a_cancelled_benchmark_leaves_nothing_behind(setting, mode):
    class Cancelled(BaseException):
        pass

    transformer = setting.model.transformer
    before = attributes(transformer)

    def on_pass(done, total):
        if done >= 6 * 3 + 4:  # inside the first run with a step cache
            assert transformer.is_cache_enabled
            raise Cancelled

    with pytest.raises(Cancelled):
        run.measure(replace(setting, mode=mode), ["taylorseer"], on_pass=on_pass)
    assert attributes(transformer) == before
    assert not transformer.is_cache_enabled
    assert not any(module._forward_pre_hooks for module in transformer.modules())


def test_what_the_runs_need_is_about_what_they_use(setting):
    setting = replace(setting, memory=True, chunks=2)
    results, _ = run.measure(setting, ["taylorseer"], defaults_only=True)
    used = [result.peak_bytes - run._weights(setting) for result in results]
    needed, held = experiment.bytes_needed(setting, ["taylorseer"]), results[1].report.nbytes
    assert used[1] < 1.1 * needed < 3 * used[1]
    sizes = setting.model.transformer, setting.height, setting.width
    plain = estimate(*sizes, sampling=setting.sampling, cache=setting.cache).device
    assert 0 < held <= needed - plain < 1.2 * held


def test_one_run_measures_calibrates_and_writes(folder, tmp_path, capsys):
    report, picture = tmp_path / "caching.json", tmp_path / "caching.png"
    options = ["--methods", "magcache,taylorseer", "--json", str(report), "--plot", str(picture)]
    cli.main(arguments(folder, *options), judge=lambda frames: {"frames": float(frames.shape[1])})
    written = json.loads(report.read_text())
    assert len(written["mag_ratios"]) == 6
    plain, *others = written["results"]
    assert plain["method"] == "none" and plain["quality"] == {} and plain["extra"] == {"frames": 9.0}
    assert {result["method"] for result in others} == {"MagCache", "TaylorSeer"}
    for result in others:
        assert 10 < result["quality"]["psnr"] < 100
        assert result["peak_bytes"] > 0 and result["report"]["computed"]["feed-forward"] < 6 * 2 * 4
    said = capsys.readouterr().out
    assert "| TaylorSeer" in said and "MagCache's constants of this model: 1." in said
    assert Image.open(picture).size == (960, 600)


def test_few_step_says_why_not(folder, tmp_path, capsys):
    target = tmp_path / "caching.json"
    options = ["--mode", "few-step", "--methods", "taylorseer", "--no-memory", "--json", str(target)]
    cli.main(arguments(folder, *options))
    assert "From one of the 4 steps to the next the prediction changes by" in capsys.readouterr().out
    assert len(json.loads(target.read_text())["step_change"]) == 3


def test_a_single_step_has_no_change(setting):
    single = replace(setting, sampling=replace(setting.sampling, sampler="renoise", denoising_steps=(1000,)))
    assert "single step" in change_note(single, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "teacache"], "named pab, .* got teacache"),
        (["--methods", ""], "got none"),
        (["--videos", "0"], "--videos must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--json", "no/f.json"], "does not exist"),
        (["--plot", "f.jpg"], "PNG"),
        (["--mode", "few-step", "--methods", "magcache"], "multi-step sampling only"),
        (["--width", "50"], "multiple of 16"),
    ],
)
def test_what_cannot_work_is_said_first(folder, options, message, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match=message):
        cli.main(arguments(folder, *options))


@pytest.mark.parametrize("mode", ["multi-step", "bidirectional"])
def test_the_backend_reaches_every_mode(setting, mode):
    with pytest.raises(ValueError, match="attention backend must be one of .* got 'flesh'"):
        run.sample(replace(setting, mode=mode, execution=ExecutionConfig(backend="flesh")), None, 0)


def test_the_hungriest_settings_decide_what_the_runs_need(setting):
    def beside_the_rest(names, more=()):
        return experiment.bytes_needed(setting, names, more) - experiment.bytes_needed(setting, [])

    one, all_of_them = beside_the_rest(["seacache"]), beside_the_rest(list(METHODS))
    assert 0 < one < all_of_them
    mine = TaylorSeer(max_order=9, taylor_factors_dtype="float32")
    assert beside_the_rest(list(METHODS), [Candidate("mine", "", mine)]) == 10 * 2 / 2 * all_of_them


# -- what docs/caching.md promises -------------------------------------------------------------------------------------


def promises():
    """(method, mode, guided, dB) of each cell of the table "Where each applies" that says that it works."""
    text = (BUNDLED.parents[1] / "docs/caching.md").read_text(encoding="utf-8").partition("## Where each applies")[2]
    for line in text[: text.index("\n\n", text.index("\n|"))].splitlines():
        title, few, *cells = [cell.strip() for cell in line.split("|")[1:-1]] or [""] * 5
        for name, method in METHODS.items():
            if title.removesuffix(" without guidance") == method.title:
                assert few == "no"
                for mode, cell in zip(("multi-step", "bidirectional"), cells):
                    yield name, mode, title == method.title, float(re.search(r", (\d+) dB$", cell)[1])


PROMISES = list(promises())


def test_every_method_and_mode_has_its_promise():
    assert {promise[:2] for promise in PROMISES} == {(n, m) for n in METHODS for m in ("multi-step", "bidirectional")}
    assert len(PROMISES) == 2 * len(METHODS) + 2  # FasterCache without guidance


@pytest.fixture
def untimed(monkeypatch):
    """Leaves out what is there for the times alone: first chunks to warm up, and the uncached video beside each cached one."""
    plain, sample = {}, run.sample

    def needed(experiment, method, seed, *progress):
        if method is not None:
            return (None, None) if experiment.chunks == 1 else sample(experiment, method, seed, *progress)
        if seed not in plain:
            plain[seed] = sample(experiment, None, seed, *progress)
        return plain[seed]

    monkeypatch.setattr(run, "sample", needed)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("mode", ["multi-step", "bidirectional"])
def test_what_works_keeps_the_video_as_well_as_promised(untimed, mode, guided):
    floors = {METHODS[name].title: least for name, *where, least in PROMISES if where == [mode, guided]}
    names, _ = experiment.applicable()
    names = [name for name in names if METHODS[name].title in floors]
    options = ["--mode", mode, "--guidance", "3" if guided else "1", "--steps", "24", "--chunks", "2"]
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    setting, vae = cli.make_experiment(parser.parse_args([*options, "--device", "cpu", "--no-memory"]))
    plain, *cached = run.measure(setting, names, defaults_only=True)[0]
    original = run.decode_video(vae, plain.videos[0])
    assert original.isfinite().all() and original.std() > 0.1
    assert len(cached) == len(names) >= len(floors) - 1
    for result in cached:
        frames = run.decode_video(vae, result.videos[0])
        quality = Similarity()(frames, original)["psnr"]
        assert frames.isfinite().all() and floors[result.method] <= quality
        assert result.report.skipped() > 0


# -- likeness ----------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_all_videos_together():
    """Some of them may be equal; half of the squared error is 3 dB."""
    scores = [{"psnr": math.inf, "ssim": 1.0}, {"psnr": 30.0, "ssim": 0.9}]
    assert run._mean(scores) == pytest.approx({"psnr": 30 + 10 * math.log10(2), "ssim": 0.95})
    assert run._mean([scores[0]] * 2)["psnr"] == math.inf


def test_psnr_and_ssim_are_the_librarys():
    image = pytest.importorskip("torchmetrics.functional.image")
    video = random_video()
    other = (video + 0.3 * random_video().flip(1)).clamp(-1, 1)
    mine = Similarity()(other, video)
    a, b = ((v.transpose(0, 1) + 1) / 2 for v in (other, video))
    assert mine["psnr"] == pytest.approx(image.peak_signal_noise_ratio(a, b, data_range=1.0).item(), abs=1e-4)
    ssim = image.structural_similarity_index_measure(a, b, data_range=1.0).item()
    assert mine["ssim"] == pytest.approx(ssim, abs=1e-6) and 0.1 < ssim < 0.99


def test_many_frames_weigh_the_same_in_pieces(monkeypatch):
    pytest.importorskip("torchmetrics")
    video = random_video()
    other = (video + torch.linspace(0, 0.5, 5).view(1, 5, 1, 1) * random_video().flip(1)).clamp(-1, 1)
    whole = Similarity()(other, video)
    monkeypatch.setattr(similarity, "FRAMES_AT_ONCE", 2)
    assert Similarity()(other, video) == pytest.approx(whole, abs=1e-6)


def without(monkeypatch, *modules):
    found = similarity.find_spec
    monkeypatch.setattr(similarity, "find_spec", lambda name: None if name in modules else found(name))


def test_without_torchmetrics_there_is_psnr_and_a_note(monkeypatch):
    without(monkeypatch, "torchmetrics")
    measure = Similarity()
    assert measure.names == ["psnr"] and "torchmetrics" in measure.notes[0]
    video = random_video()
    assert measure(video, video) == {"psnr": math.inf}
    assert measure(video + 0.2, video) == {"psnr": pytest.approx(20, abs=1e-4)}  # 0.1 of the range


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """A stand-in for torchvision, whose weights would lie below tmp_path, and for LPIPS itself."""
    pytest.importorskip("torchmetrics")
    vision, models, lpip = ModuleType("torchvision"), ModuleType("torchvision.models"), ModuleType("lpip")
    models.AlexNet_Weights = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://nowhere.invalid/alexnet-1.pth"))
    lpip.LearnedPerceptualImagePatchSimilarity = lambda net, normalize: lambda a, b: (a - b).abs().mean()
    found = similarity.find_spec
    monkeypatch.setattr(similarity, "find_spec", lambda name: name == "torchvision" or found(name))
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", lpip)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / "alexnet-1.pth"


def test_lpips_only_where_its_weights_are(torchvision):
    measure = Similarity()
    assert measure.names == ["psnr", "ssim"] and str(torchvision) in measure.notes[0]
    torchvision.parent.mkdir()
    torchvision.touch()
    measure, video = Similarity(), random_video()
    assert measure.names == ["psnr", "ssim", "lpips"] and measure.notes == []
    assert measure(video + 0.2, video)["lpips"] == pytest.approx(0.1)


# -- what is shown -----------------------------------------------------------------------------------------------------


def measured(method, strength, speed_up, psnr):
    entry = experiment.StepCacheResult(method, strength, [1.0], [speed_up], quality={"psnr": psnr} if psnr else {})
    if psnr:
        parts = ("self-attention", "cross-attention", "feed-forward")
        entry.report = StepCacheReport(method, dict(zip(parts, (6, 8, 8))), dict.fromkeys(parts, 8), 2**20)
    return entry


def test_the_table_has_the_columns_that_were_measured():
    results = [measured("none", "", 1.0, None), measured("TaylorSeer", "every 5", 1.5, math.inf)]
    head, _, plain, cached = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(results).splitlines()]
    assert "PSNR, dB" in head and not {"SSIM", "LPIPS", "peak memory"} & set(head)
    values = dict(zip(head, cached))
    assert [values[name] for name in ("speed-up", "skipped: self", "ffn", "its memory", "PSNR, dB")] == [
        "1.50", "25%", "0%", "1.0 MiB", "same"
    ]  # fmt: skip
    assert dict(zip(head, plain))["speed-up"] == "1"


def test_the_plot_has_a_marker_at_each_point_and_none_without_points(setting):
    results = [measured("none", "", 1.0, None), measured("A", "1", 1.1, 40.0), measured("A", "2", 1.9, 20.0)]
    picture = plot(setting, [*results, measured("B", "1", 0.8, math.inf)])
    pixels = np.asarray(picture, dtype=int)[:, :860]  # without the legend
    (rows, columns), (others, _) = (
        np.nonzero(np.abs(pixels - colour).max(2) < 8) for colour in ((0, 114, 178), (213, 94, 0))
    )
    assert np.ptp(columns) > 300 and np.ptp(rows) > 300
    assert others.max() < rows.min()  # the same video: above all others
    with pytest.raises(ValueError, match="nothing to draw"):
        plot(setting, results[:1])


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [0.97, 2.5], [-3, -3], [19.5, 68.3], [0.1, 0.12], [0, 1e-6], [5, 5e9]]
)
def test_ticks_are_few_round_and_enclose(values):
    at = ticks(values)
    assert 2 <= len(at) <= 9 and at[0] <= min(values) and at[-1] >= max(values)
    steps = {round((b - a) / (at[1] - at[0]), 6) for a, b in zip(at, at[1:])}
    assert steps == {1.0} and f"{at[1] - at[0]:e}"[:3] in ("1.0", "2.0", "5.0")


def test_long_titles_and_names_stay_inside(monkeypatch):
    from PIL import ImageDraw

    boxes = []
    text = ImageDraw.ImageDraw.text

    def recorded(self, at, words, font, anchor="la", **options):
        boxes.append(self.textbbox(at, words, font=font, anchor=anchor))
        text(self, at, words, font=font, anchor=anchor, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    names = ["Pyramid Attention Broadcast", "Something with a Rather Long Name"]
    picture = draw({n: [(1, 2), (2, 3)] for n in names}, Axis("x"), Axis("a long label of the axis"), "word " * 80)
    boxes = [box for box in boxes if box[:2] != (0, 0)]
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        assert x1 <= 2 * picture.width and y1 <= 2 * picture.height
        for a0, b0, a1, b1 in boxes[:index]:
            assert x0 >= a1 or a0 >= x1 or y0 >= b1 or b0 >= y1


# -- the detector ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["left", "up and left"])
def test_the_detector_judges_by_the_prompt(way):
    scene = Scene("circle", "red", way)
    start = random_start(scene, torch.Generator().manual_seed(0))
    frames = render([scene], trajectory(scene, start, 13)[None])[0]
    right = {"colour right": 1.0, "shape right": 1.0, "direction right": 1.0}
    assert judge_of(f"a red circle moving {way}")(frames) == right
    assert judge_of("a blue square moving slowly up")(frames) == dict.fromkeys(right, 0.0)
    with pytest.raises(ValueError, match="not 'a dog'"):
        judge_of("a dog")
