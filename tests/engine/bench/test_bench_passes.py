"""The benchmarks of one pass and of its kernels: that they measure the pass that they say, and count its bytes."""

import json
from dataclasses import replace

import pytest
import torch

from rolling_kv.bench.chunks.experiment import Workload
from rolling_kv.bench.gauges import memory_beside
from rolling_kv.bench.kernels.run import measure_attention, measure_products
from rolling_kv.bench.kinds import kind_of, taken_apart
from rolling_kv.bench.passes import run
from rolling_kv.bench.passes.run import PassExperiment
from rolling_kv.bench.random_model import BenchSize
from rolling_kv.cli import main
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig

SMALL = BenchSize(layers=2, dim=128, ffn=96, height=32, width=48, window=7)
INPUTS = 2**14
"""More than the rotations and sinusoids that an attachment keeps between passes."""
LOAD = Workload(SMALL, SMALL.height, SMALL.width, 1, CacheConfig(7))


@pytest.mark.parametrize(
    "cache", [CacheConfig(7), CacheConfig(7, storage="int8"), CacheConfig(6, sink=1, offload=True)]
)
def test_what_is_held_is_what_was_announced_and_the_passes_need_no_more(cache):
    result = run.measure(PassExperiment(replace(LOAD, cache=cache), repeats=1))
    announced = result.announced
    unpacked = announced.cache + announced.prompts + announced.host - result.held
    assert -INPUTS < unpacked <= (announced.cache if cache.storage == "int8" else 0)
    assert result.held < result.peak
    assert result.peak - result.held <= announced.activations + max(unpacked, 0) + 2**20  # a few rows beside the tokens
    assert result.weights > 0 and result.step > 0 and result.context > 0


def test_a_step_is_a_pass_over_a_full_window_whose_frames_have_moved_on(monkeypatch):
    seen = []
    opened = run.apply_rolling_kv_cache

    def attached(transformer, execution):
        attachment = opened(transformer, execution)
        forward = attachment.forward

        def noted(x, timestep, branch, **options):
            window = branch.cache.window
            seen.append((x.shape[2], timestep, window.filled, branch.cache.position, options))
            return forward(x, timestep, branch, **options)

        attachment.forward = noted
        return attachment

    monkeypatch.setattr(run, "apply_rolling_kv_cache", attached)
    run.measure(PassExperiment(replace(LOAD, sampling=SamplingConfig(chunk=2)), repeats=1))
    steps = [call for call in seen if not call[4]]
    assert {call[:2] for call in steps} == {(2, 750.0)} and {call[2] for call in seen} == {7}
    assert {call[3] for call in seen} == {14}
    assert {call[1] for call in seen if call[4] == {"keys_only": True}} == {0.0}


def test_kernels_go_by_their_names():
    names = {
        "attention": ["flash_fwd_kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"],
        "convolution": ["sm90_xmma_fprop_implicit_gemm_bf16", "vol2col_kernel", "aten::mkldnn_convolution"],
        "matrix product": ["nvjet_tst_128x256", "cutlass_80_tensorop_bf16", "aten::addmm", "mkldnn::_linear_pointwise"],
        "copy": ["Memcpy DtoD", "aten::copy_"],
        "other": ["vectorized_elementwise_kernel", "triton_poi_fused_0"],
    }
    for kind, examples in names.items():
        assert {kind_of(name) for name in examples} == {kind}


def test_a_turn_is_taken_apart_into_all_of_its_time():
    x = torch.randn(64, 64)
    kernels = taken_apart(lambda: (x @ x).exp(), torch.device("cpu"), show=2)
    assert {"matrix product", "other"} <= kernels.kinds.keys() and kernels.launches >= 2
    assert len(kernels.longest) == 2 and kernels.longest[0][1] >= kernels.longest[1][1]


def test_memory_beside_what_was_there():
    there = torch.zeros(1000)
    with memory_beside(torch.device("cpu")) as memory:
        kept = there + 1
        (kept + 1).sum()
        assert memory.live == 4000 and 8000 <= memory.peak < 8100
        memory.restart()
        assert memory.peak == 4000


def test_each_backend_attends_over_so_many_frames_or_says_why_not():
    told = []
    rows = measure_attention(LOAD, 1, told.append)
    assert [row.frames for row in rows[::4]] == [3, 7] and len(rows) == len(told) == 8
    for row in rows:
        assert row.error or (row.milliseconds > 0 and row.tflops > 0 and row.difference < 1e-5)
    assert not rows[0].error


def test_the_products_are_those_of_a_block():
    rows = measure_products(LOAD, 1, lambda text: None)
    assert [row.shape for row in rows] == [(18, 128, 128), (18, 384, 128), (18, 96, 128), (18, 128, 96)]
    assert all(row.float8 is None and row.fused_gelu for row in rows)


def test_a_window_without_an_end_is_refused():
    with pytest.raises(ValueError, match="full window"):
        PassExperiment(replace(LOAD, cache=CacheConfig("all")))


def test_graphs_are_refused_where_there_is_no_gpu():
    with pytest.raises(ValueError, match="CUDA"):
        replace(LOAD, execution=ExecutionConfig(cuda_graphs=True))


def test_the_commands_print_tables_and_write_every_figure(tmp_path, capsys):
    main(f"bench passes --height 32 --width 32 --window 6 --repeats 1 --json {tmp_path / 'p.json'}".split())
    out = capsys.readouterr().out
    assert "window 6, chunk 3, float32" in out and "| keys and values" in out and "| matrix product" in out
    written = json.loads((tmp_path / "p.json").read_text())["result"]
    assert written["announced_times_real"] == written["announced"]["device"] / written["peak"]
    main(f"bench kernels --height 32 --width 32 --repeats 1 --json {tmp_path / 'k.json'}".split())
    assert "| default" in capsys.readouterr().out
    assert {"attention", "products", "machine"} <= json.loads((tmp_path / "k.json").read_text()).keys()
