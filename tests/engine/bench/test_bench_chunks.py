"""The benchmark: that it measures the work it says it measures. Nothing here depends on how fast the machine is."""

import argparse
import gc
import json
import math
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rolling_kv.bench.chunks import cli, report, run
from rolling_kv.bench.chunks.contenders import Contender, Recompute, Rolling
from rolling_kv.bench.chunks.experiment import Workload
from rolling_kv.bench.chunks.floor import Floor
from rolling_kv.bench.chunks.growing import Growing
from rolling_kv.bench.chunks.run import Result, check_agreement, share_of_floor
from rolling_kv.bench.figures import BenchError
from rolling_kv.bench.gauges import TensorBytes, storage_bytes
from rolling_kv.bench.random_model import SIZES, BenchSize, weight_shapes
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.cli import main
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from tools.comfyui import sampler as comfyui_sampler
from tools.comfyui.env import ComfyInstall

SMALL = BenchSize(layers=2, dim=128, ffn=96, height=32, width=48, window=7)
STEPS = 2


def workload(chunks=4, window=7, **settings):
    sampling = SamplingConfig(denoising_steps=(1000, 500))
    return Workload(SMALL, SMALL.height, SMALL.width, chunks, CacheConfig(window), sampling, **settings)


@pytest.fixture(scope="module")
def weights():
    return workload().random_weights()


def videos(method, work, weights):
    made = method(work, weights)
    latents = [made.chunk(index) for index in range(work.chunks)]
    made.close()
    return latents


def difference(x, y):
    return ((x - y).norm() / y.norm()).item()


class Calls(TorchDispatchMode):
    """The shapes of every linear (rows, in, out) and every attention (queries, keys)."""

    def __init__(self):
        super().__init__()
        self.linears = []
        self.attentions = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "linear" in str(function):  # aten's, and oneDNN's with the activation in it
            self.linears.append((args[0].shape[-2], *reversed(args[1].shape)))
        elif function is torch.ops.aten.addmm.default:
            self.linears.append((args[1].shape[0], *args[2].shape))
        elif "scaled_dot_product" in str(function):
            self.attentions.append((args[0].shape[2], args[1].shape[2]))
        return function(*args, **(kwargs or {}))


def calls_of_chunk(method, work, weights, index):
    made = method(work, weights)
    for earlier in range(index):
        made.chunk(earlier)
    with Calls() as calls:
        made.chunk(index)
    made.close()
    return calls


@pytest.mark.parametrize(
    "name, parameters",
    [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)],
)
def test_true_sizes_are_those_of_wan(name, parameters):
    """Wan 2.1's checkpoints have these numbers of parameters."""
    assert sum(torch.Size(shape).numel() for shape in weight_shapes(SIZES[name]).values()) == parameters


def test_weights_fit_the_stock_transformer_and_are_shared_by_it(weights):
    transformer = build_transformer(weights)
    assert transformer.config.num_layers == 2 and transformer.config.num_attention_heads == 1
    assert storage_bytes([*transformer.parameters(), *weights.values()]) == storage_bytes(weights.values())


def test_half_precision_weights_are_made_in_half_precision():
    work = workload(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in work.random_weights().values()} == {torch.bfloat16}


def test_methods_make_the_same_video_as_far_as_they_should(weights):
    work = workload()
    ours, again, grown = (videos(method, work, weights) for method in (Rolling, Recompute, Growing))
    assert difference(again[0], ours[0]) < 1e-5
    assert difference(again[1], ours[1]) > 1e-3, "recomputing with one timestep is not the same video"
    assert max(difference(x, y) for x, y in zip(grown[:2], ours)) < 1e-5
    assert difference(grown[2], ours[2]) > 1e-5, "frame 0 leaves before (a) attends, and after (c) has"


@pytest.mark.parametrize("index", [0, 1, 3])
def test_the_floor_is_the_engines_products_and_attentions(weights, index):
    """Beside the floor, the engine only has the final projection, and products of few rows: condition and prompt."""
    work = workload()
    engine, floor = (calls_of_chunk(method, work, weights, index) for method in (Rolling, Floor))
    assert sorted(engine.attentions) == sorted(floor.attentions)
    tokens = 3 * work.tokens_per_frame
    in_blocks = [shape for shape in engine.linears if shape[0] == tokens and shape[2] != 4 * 16]
    assert sum(map(math.prod, in_blocks)) == sum(map(math.prod, floor.linears)) > 0


def test_attention_sees_what_each_method_says(weights):
    work, frame = workload(), 6
    chunk = 3 * frame
    grown = calls_of_chunk(Growing, work, weights, 3).attentions
    assert sorted({keys // frame for queries, keys in grown if keys != 512}) == [7, 10]
    assert len(grown) == 2 * (STEPS + 1) * SMALL.layers, "a context pass in full"
    plain = calls_of_chunk(Recompute, work, weights, 3).attentions
    assert {(queries, keys) for queries, keys in plain if keys != 512} == {(7 * frame, 7 * frame)}
    ours = calls_of_chunk(Rolling, work, weights, 3).attentions
    assert {(queries, keys) for queries, keys in ours if keys != 512} == {(chunk, 7 * frame)}
    assert len(ours) == 2 * ((STEPS + 1) * SMALL.layers - 1), "the context pass has no attention in the last block"


def test_tensor_bytes_follow_what_is_alive():
    before = torch.zeros(1000)
    with TensorBytes(live=before.nbytes) as tensors:
        view = before[:10]
        assert tensors.live == 4000, "a view of what was there before is nothing new"
        one = torch.zeros(500)
        pair = [one.view(5, 100), one * 2]
        assert tensors.live == 8000
        del one
        gc.collect()
        assert tensors.live == 8000, "a view keeps its storage"
        pair.clear()
        gc.collect()
        assert tensors.live == 4000 and tensors.peak == 8000
        tensors.restart()
        (before + 1).sum()
        assert tensors.peak == 8004
    del view


def test_each_chunk_has_a_peak_of_its_own(weights):
    class Uneven(Contender):
        def chunk(self, index):
            return torch.ones(1000 if index == 1 else 10).sum()

    first, second, third = Uneven.follow_memory(workload(chunks=3), weights)
    assert second - first == 990 * 4 and third == first


def test_memory_of_the_engine_is_flat_and_holds_its_cache(weights):
    work = workload(chunks=30)
    peaks = Rolling.follow_memory(work, weights)
    full = [peaks[index] for index in work.full_window]
    assert max(full) <= min(full) * 1.001
    cache = 2 * SMALL.layers * 7 * work.tokens_per_frame * SMALL.dim * 4
    assert full[0] > storage_bytes(weights.values()) + cache


def test_memory_of_an_unlimited_window_grows_by_its_keys(weights):
    short, long = (Rolling.follow_memory(workload(chunks=chunks, window="all"), weights) for chunks in (3, 8))
    per_chunk = 2 * SMALL.layers * 3 * workload().tokens_per_frame * SMALL.dim * 4
    assert long[-1] - short[-1] >= 5 * per_chunk


def test_full_window_begins_when_every_pass_sees_it():
    assert workload(chunks=6).full_window == [3, 4, 5]  # chunk 2's context pass, timed with chunk 3, is the first
    assert workload(chunks=2).full_window == [1]
    assert workload(chunks=5, window="all").full_window == [4]


def test_passes_are_measured_after_they_have_been_recorded(monkeypatch):
    monkeypatch.setattr(ExecutionConfig, "_check_cuda_graphs", lambda *_: None)
    recorded = workload(chunks=8, execution=ExecutionConfig(cuda_graphs=True))
    assert workload(chunks=8).full_window == [3, 4, 5, 6, 7] and recorded.full_window == [5, 6, 7]


def test_figures_are_medians_over_the_full_window():
    work = workload(chunks=5)
    ours = Result("a", "engine", "", [[9, 9, 9, 2.0, 4.0], [9, 9, 9, 2.0, 8.0]], [1] * 5, [10, 10, 10, 100, 101])
    floor = Result("e", "floor", "", [[1, 1, 1, 1.0, 3.0], [1, 1, 1, 1.0, 2.0]])
    assert ours.full_seconds(work) == 3.0
    assert share_of_floor(work, ours, floor) == 0.5  # of 1/2, 3/4, 1/2, 2/8
    row = report.summary(work, [ours, floor])["a"]
    assert row["frames_per_second"] == 12 / 3.0
    assert row["peak_bytes"] == 101 and row["peak_growth"] == pytest.approx(0.01)


def test_another_video_is_refused():
    work = workload()
    ours = torch.randn(work.chunk_shape, generator=torch.Generator().manual_seed(0))
    theirs = ours * 1.001
    with pytest.raises(BenchError, match=r"\(c\) and \(a\).*chunk 2.*1\.0e-03"):
        check_agreement(work, 1, {"a": ours, "c": theirs})
    with pytest.raises(BenchError):
        check_agreement(work, 0, {"a": ours, "b": theirs * float("nan")})
    check_agreement(work, 1, {"a": ours, "b": theirs, "c": ours, "e": None})
    check_agreement(work, 3, {"a": ours, "c": theirs})  # the first frame has left: their semantics differ


def test_a_video_that_is_not_finite_is_refused():
    class Broken(Rolling):
        def chunk(self, index):
            return super().chunk(index) / (index - 1)

    with pytest.raises(BenchError, match=r"\(a\) made a chunk 2 with values that are not finite"):
        run.measure(workload(chunks=3), [Broken], memory=False, say=lambda text: None)


def test_methods_take_turns_and_the_floor_runs_right_after_the_engine(monkeypatch, weights):
    turns = []
    for method in cli.CONTENDERS:
        chunk = method.chunk

        def noted(self, index, chunk=chunk):
            turns.append(f"{self.letter}{index}")
            return chunk(self, index)

        monkeypatch.setattr(method, "chunk", noted)
    results = run.measure(workload(chunks=2), cli.CONTENDERS, repeats=2, memory=False, say=lambda text: None)
    assert turns == "a0 e0 b0 c0 a1 e1 b1 c1".split() * 2
    assert all(len(result.seconds) == 2 and len(result.seconds[1]) == 2 for result in results)
    assert results[0].kv_bytes == [2 * 2 * 7 * 6 * 128 * 4] * 2


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path, capsys):
    target = tmp_path / "bench.json"
    main(["bench", "--size", "tiny", "--chunks", "2", "--window", "3", "--methods", "abce", "--json", str(target)])
    printed = capsys.readouterr().out
    for title in ("(a) rolling cache", "(b) no cache", "(c) grow and trim", "(e) floor"):
        assert f"| {title}" in printed
    content = json.loads(target.read_text())
    assert content["settings"]["size"] == "tiny" and content["machine"]["torch"] == torch.__version__
    assert content["full_window_chunks"] == [2] and content["methods"].keys() == {"a", "b", "c", "e"}
    assert len(content["methods"]["a"]["seconds"][0]) == len(content["methods"]["a"]["peak_bytes"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_plot_is_a_picture(tmp_path):
    work = workload(chunks=4)
    result = Result("a", "engine", "", [[1.0] * 4], [1] * 4, [10] * 4)
    report.write_plot(tmp_path / "bench.png", "title", work, [result])
    data = (tmp_path / "bench.png").read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24])[0] > 500


def test_a_plot_shows_memory_where_it_was_followed(monkeypatch):
    drawn = []
    draw = report.draw
    monkeypatch.setattr(
        report, "draw", lambda curves, *args, **kwargs: drawn.append(curves) or draw(curves, *args, **kwargs)
    )
    ours = Result("a", "engine", "", [[1.0, 3.0], [2.0, 3.0]], [1] * 2, [2**20, 2**21])
    floor = Result("e", "floor", "", [[1.0, 1.0]])
    both = report.plot("title", workload(chunks=2), [ours, floor])
    seconds, memory = drawn
    assert seconds == {"(a) engine": [(1, 1.5), (2, 3.0)], "(e) floor": [(1, 1.0), (2, 1.0)]}
    assert memory == {"(a) engine": [(1, 1.0), (2, 2.0)], "(e) floor": []}, "it holds its place, and so its colour"
    assert both.height == 2 * report.plot("title", workload(chunks=2), [floor]).height


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--methods", "az"], "letters of a"),
        (["--window", "2"], "window"),
        (["--height", "100"], "multiple of 16"),
        (["--chunks", "0"], "at least 1 chunk"),
        (["--repeats", "0"], "at least 1"),
        (["--json", "nowhere/bench.json"], "does not exist"),
        (["--plot", "bench.jpg"], "png"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(arguments, said, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_, **__: pytest.fail("measured"))
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(ValueError, match=said):
        cli.main(parser.parse_args(arguments))


def test_options_before_a_subcommand_are_refused(capsys):
    """Its own defaults would replace them without a word."""
    with pytest.raises(SystemExit):
        main(["bench", "--json", "bench.json", "caching"])
    assert "--json stands before 'caching'" in capsys.readouterr().err


@pytest.fixture
def no_comfyui(monkeypatch):
    monkeypatch.setattr(comfyui_sampler, "find_install", lambda: None)


def test_without_a_comfyui_the_rest_is_measured_and_a_note_says_so(no_comfyui, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CONTENDERS", (Floor,))
    main(["bench", "--chunks", "1", "--no-memory"])
    assert "(d) was not measured: no ComfyUI was found" in capsys.readouterr().out
    main(["bench", "--chunks", "1", "--no-memory", "--methods", "e"])
    assert "(d)" not in capsys.readouterr().out


def test_asking_for_comfyui_where_it_cannot_run_is_an_error(no_comfyui, monkeypatch):
    with pytest.raises(SystemExit, match="no ComfyUI was found; name one in COMFYUI_PATH"):
        main(["bench", "--methods", "d"])
    install = ComfyInstall(Path("comfyui"), Path("python"), {"torch": "2"}, cuda=False)
    monkeypatch.setattr(comfyui_sampler, "find_install", lambda: install)
    with pytest.raises(SystemExit, match="float32 only"):
        main(["bench", "--methods", "d", "--dtype", "bfloat16", "--device", "cpu"])


def test_a_comfyui_that_does_not_start_is_told_of_and_left_out(monkeypatch, capsys, tmp_path):
    install = ComfyInstall(tmp_path, Path(sys.executable), {"torch": "2"}, cuda=False)
    monkeypatch.setattr(comfyui_sampler, "find_install", lambda: install)
    monkeypatch.setattr(cli, "CONTENDERS", (Floor,))
    main(["bench", "--chunks", "1", "--no-memory", "--device", "cpu"])
    said = capsys.readouterr().out
    assert f"(d) was not measured: ComfyUI at {tmp_path}" in said and "No module named 'comfy'" in said


def test_another_package_named_tools_is_not_mistaken_for_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "tools.comfyui.sampler", None)  # import fails
    with cli.comfyui_sampler(workload(), None) as (sampler, note):
        assert sampler is None and "has to run in" in note


def test_the_published_pack_has_no_comfyui_to_measure(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "rolling_kv/bench/chunks/cli.py"))
    with cli.comfyui_sampler(workload(), None) as (sampler, note):
        assert sampler is None and "source repository only" in note


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    main(["bench", "--chunks", "1", "--methods", "e", "--threads", "2", "--no-memory"])
    assert torch.get_num_threads() == before
