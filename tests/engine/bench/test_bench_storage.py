"""The benchmark of storages: each row is kept as it says, and its figures are those of that row."""

import argparse
import json

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.bench.figures import BenchError
from rolling_kv.bench.storage import cli as storage_cli
from rolling_kv.bench.storage import experiment, report, run
from rolling_kv.bench.storage.experiment import StorageExperiment, Variant
from rolling_kv.bench.storage.run import StorageRun
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.cli import main
from rolling_kv.config import CACHE_STORAGES, CacheConfig, SamplingConfig
from rolling_kv.presets import ModelPreset

pytest.importorskip("gguf")

PRESET = ModelPreset("test", SamplingConfig(denoising_steps=(1000, 500)), CacheConfig(6, sink=1))
HEIGHT, WIDTH, CHUNKS = 32, 48, 4
VARIANTS = experiment.variants(["Q8_0", "Q4_0"])


def setting(dtype=torch.float32, **changes):
    transformer = tiny_transformer(ffn_dim=256).to(dtype)
    prompt = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = dict(name="test", weights=transformer.state_dict(), config={}, preset=PRESET, prompt=prompt, height=HEIGHT,
                 width=WIDTH, chunks=CHUNKS, dtype=dtype, device=torch.device("cpu"))  # fmt: skip
    return StorageExperiment(**{**given, **changes})


@pytest.fixture(scope="module")
def measured():
    """The results of every variant in float32, by variant."""
    results = run.measure(setting(), VARIANTS, say=lambda _: None)
    assert [result.variant for result in results] == VARIANTS
    return {result.variant: result for result in results}


def test_the_variants_are_every_cache_and_every_storage_of_the_weights():
    assert CACHE_STORAGES[:3] == ("model", "float8", "int8")
    caches = [(offload, storage) for offload in (False, True) for storage in CACHE_STORAGES]
    assert [(v.offload, v.cache) for v in VARIANTS if v.weights == "model"] == caches
    assert [v.weights for v in VARIANTS if v.weights != "model"] == ["float8", "Q8_0", "Q4_0"]
    assert len({variant.title for variant in VARIANTS}) == len(VARIANTS)


def test_packings_are_those_that_the_package_can_make():
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"} <= set(experiment.packings())
    for packing in experiment.packings():
        assert experiment.build(setting(), packing).transformer.blocks[0].attn1.to_q.weight.dtype == torch.uint8
    experiment.check_packings(["Q8_0"])
    with pytest.raises(ValueError, match="packs weights as .*Q8_0.*; got Q4_K"):
        experiment.check_packings(["Q8_0", "Q4_K"])


def test_without_the_package_nothing_can_be_packed(monkeypatch):
    monkeypatch.setattr(experiment, "is_gguf_available", lambda: False)
    experiment.check_packings([])
    with pytest.raises(ValueError, match=r'pip install "gguf.*--gguf none'):
        experiment.check_packings(["Q8_0"])


@pytest.mark.parametrize(
    "kept, dtype", [("model", torch.float32), ("float8", torch.float8_e4m3fn), ("Q8_0", torch.uint8)]
)
def test_weights_are_kept_as_the_row_says(kept, dtype):
    shared = setting()
    model = experiment.build(shared, kept)
    linears = [m for m in model.transformer.blocks.modules() if hasattr(m, "in_features")]
    assert {layer.weight.dtype for layer in linears} == {dtype}
    assert {tensor.dtype for tensor in shared.weights.values()} == {torch.float32}, "others use them too"


def test_the_cache_is_kept_as_the_row_says():
    for variant in VARIANTS:
        cache = StorageRun(setting(), variant, experiment.build(setting(), "model")).session.cache_config
        assert (cache.storage, cache.offload) == (variant.cache, variant.offload)
        assert (cache.window, cache.sink) == (6, 1)


def test_bytes(measured):
    shape = CacheShape(2, 1, 6, 1, 128, torch.float32)
    values = sum(tensor.numel() for tensor in setting().weights.values())
    linears = [m for m in tiny_transformer(ffn_dim=256).blocks.modules() if isinstance(m, torch.nn.Linear)]
    matrices, biases = (sum(getattr(m, part).numel() for m in linears) for part in ("weight", "bias"))
    saved = {
        "model": 0,
        "float8": 3 * (matrices + biases),
        "Q8_0": (4 - 8.5 / 8) * matrices,
        "Q4_0": (4 - 4.5 / 8) * matrices,
    }
    plain = measured[Variant()].weight_bytes
    assert plain >= 4 * values
    for variant, result in measured.items():
        total = 6 * shape.bytes_per_frame(variant.cache)
        assert result.cache_bytes == ((total, total) if variant.offload else (total, 0))  # two layers are all of them
        assert plain - result.weight_bytes == saved[variant.weights]


def test_errors_are_against_float32_and_rank_as_the_precisions_do(measured):
    last = {variant: result.error[-1] for variant, result in measured.items()}
    assert all(len(result.error) == len(result.seconds) == CHUNKS for result in measured.values())
    assert last[Variant()] == last[Variant(offload=True)] == 0
    for offload in (False, True):
        assert (
            0 < 2 * last[Variant(cache="int8", offload=offload)] < last[Variant(cache="float8", offload=offload)] < 0.1
        )
    assert 0 < 2 * last[Variant("Q8_0")] < last[Variant("float8")] < last[Variant("Q4_0")] < 0.5
    assert measured[Variant(cache="float8")].error[0] > 0, "a chunk reads its own keys back"


def test_half_precision_has_an_error_of_its_own():
    (result,) = run.measure(setting(torch.bfloat16, memory=False), [Variant()], say=lambda _: None)
    assert 1e-3 < result.error[-1] < 0.05 and result.peak_bytes is None


def test_peaks_hold_weights_and_cache(measured):
    for variant, result in measured.items():
        assert result.peak_bytes > result.weight_bytes + result.cache_bytes.device, variant
    assert measured[Variant("Q4_0")].peak_bytes < measured[Variant("Q8_0")].peak_bytes < measured[Variant()].peak_bytes


def test_variants_take_turns(monkeypatch):
    turns = []
    chunk = StorageRun.chunk

    def noted(self):
        turns.append(self.session.cache_config.storage)
        return chunk(self)

    monkeypatch.setattr(StorageRun, "chunk", noted)
    run.measure(setting(chunks=2, memory=False), VARIANTS[:3], say=lambda _: None)
    assert turns == ["model"] * 2 + ["model", "float8", "int8"] * 2  # the reference comes first


def test_figures_are_medians_over_the_full_window():
    shared = setting(chunks=5)  # chunks 2 to 4 see a window of 6 in every pass
    first = run.StorageResult(Variant(), 10, seconds=[9, 9, 1.0, 2.0, 4.0], error=[9, 9, 0.0, 0.0, 0.0])
    other = run.StorageResult(Variant("float8"), 5, seconds=[1, 1, 2.0, 3.0, 12.0], error=[9, 9, 0.1, 0.2, 0.4])
    row = report.summary(shared, [first, other])[1]
    assert (row["seconds"], row["times_the_first"], row["error"]) == (3.0, 2.0, 0.2)


def test_a_video_that_is_not_finite_is_refused(monkeypatch):
    chunk = StorageRun.chunk
    monkeypatch.setattr(StorageRun, "chunk", lambda self: chunk(self) * float("nan"))
    with pytest.raises(BenchError, match="weights model, cache model: chunk 1 has values that are not finite"):
        run.measure(setting(), VARIANTS[:1], say=lambda _: None)


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path, capsys):
    target = tmp_path / "storage.json"
    main(
        [
            "bench",
            "storage",
            "--size",
            "tiny",
            "--chunks",
            "2",
            "--window",
            "3",
            "--gguf",
            "Q8_0",
            "--json",
            str(target),
        ]
    )
    printed = capsys.readouterr().out
    assert (
        printed.count("\n| model ") == 2 * len(CACHE_STORAGES)
        and "| float8  | model" in printed
        and "| Q8_0    | model" in printed
    )
    content = json.loads(target.read_text())
    assert (
        content["full_window_chunks"] == [2]
        and len(content["summary"]) == len(content["by_chunk"]) == 2 * len(CACHE_STORAGES) + 2
    )
    assert all(row["peak_bytes"] and row["seconds"] > 0 for row in content["summary"])
    assert [path.name for path in tmp_path.iterdir()] == ["storage.json"]


def test_the_command_measures_a_model_of_ones_own(tmp_path, capsys):
    from rolling_kv.tiny import make_tiny

    folder = make_tiny(tmp_path / "tiny")
    main(["bench", "storage", "--model", str(folder), "--height", "32", "--width", "32", "--chunks", "1",
          "--gguf", "none", "--no-memory"])  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("tiny, 'a red circle moving left'; 32x32, 1 chunk of 3 latent frames, float32")
    assert printed.count("\n| model ") == 2 * len(CACHE_STORAGES) and "| Q8_0" not in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--gguf", "Q4_K"], "got Q4_K"),
        (["--chunks", "0"], "at least 1"),
        (["--threads", "0"], "at least 1"),
        (["--json", "nowhere/storage.json"], "does not exist"),
        (["--size", "tiny", "--window", "2"], "window"),
        (["--size", "tiny", "--height", "100"], "multiple of 16"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(arguments, said, monkeypatch):
    monkeypatch.setattr(storage_cli, "measure", lambda *_, **__: pytest.fail("measured"))
    parser = argparse.ArgumentParser()
    storage_cli.add_arguments(parser)
    with pytest.raises(ValueError, match=said):
        storage_cli.main(parser.parse_args(arguments))
