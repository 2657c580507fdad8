"""torch.compile: the same video, and no compilation from the second chunk on."""

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.bench.storage.experiment import pack
from rolling_kv.checkpoints.float8 import store_float8
from rolling_kv.checkpoints.model import CausalModel, load_model
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.wan.execution import compiled_code

SAMPLING = SamplingConfig(chunk=2, denoising_steps=(1000, 500))


@pytest.fixture
def compilations(monkeypatch):
    """Counts graphs handed to the compiler; they then run as they are, so the test needs no C++ compiler."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain(self, backend=count, **options))
    yield graphs
    torch._dynamo.reset()


def test_chunks_after_the_first_compile_nothing(compilations):
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12, num_layers=6)
    model = CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(5, sink=1)))
    prompt = torch.randn(1, 6, transformer.config.text_dim, generator=torch.Generator().manual_seed(0))

    def video(**options):
        with RollingSession(model, prompt, height=32, width=48, **options) as session:
            counts = [len(compilations) for _ in session.generate(8, seed=7)]
        return session.state.latents(), counts

    plain, _ = video()
    compiled, counts = video(execution=ExecutionConfig(compile=True))
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
    # The second chunk brings the context pass of the first one; the window fills, evicts and wraps after that.
    assert 0 < counts[0] <= counts[1] and counts[1:] == counts[1:2] * 7
    assert counts[1] < 2 * len(transformer.blocks)  # one compilation serves every block
    assert not any("_compiled_call_impl" in vars(block) for block in transformer.blocks)
    again, _ = video(execution=ExecutionConfig(compile=True))
    assert torch.equal(again, compiled) and len(compilations) == counts[-1]


def test_weights_of_a_gguf_file_compile_as_others_do(compilations, tmp_path):
    """Unpacking is a part of the compiled code, that of K-quants too."""
    pytest.importorskip("gguf")
    from gguf_files import Kind, k_quant, write_gguf

    counts = []
    for packing in ("model", "Q8_0", "Q4_K"):
        weights = tiny_transformer(num_attention_heads=2, ffn_dim=512).state_dict()
        if packing == "Q4_K":  # the package cannot pack it
            write_gguf(tmp_path / "model.gguf", weights, Kind.Q4_K, pack=k_quant)
            model = load_model(tmp_path / "model.gguf", preset=ModelPreset("test", SAMPLING, CacheConfig(5)))
        else:
            transformer = build_transformer(weights if packing == "model" else pack(weights, packing))
            model = CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(5)))
        prompt, before = torch.zeros(1, 6, model.config.text_dim), len(compilations)
        torch._dynamo.reset()
        with RollingSession(model, prompt, height=32, width=48, execution=ExecutionConfig(compile=True)) as session:
            list(session.generate(3, seed=7))
        counts.append(len(compilations) - before)
    assert counts[0] == counts[1] == counts[2] > 0


def test_float8_weights_compile_as_others_do(compilations):
    """They are widened inside of the compiled parts: as many graphs, and the same video as uncompiled."""
    counts, videos = [], []
    for storage, execution in (("model", True), ("float8", True), ("float8", False)):
        transformer = tiny_transformer()
        if storage == "float8":
            store_float8(transformer)
        model = CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(5)))
        prompt, before = torch.zeros(1, 6, transformer.config.text_dim), len(compilations)
        torch._dynamo.reset()
        execution = ExecutionConfig(compile=execution)
        with RollingSession(model, prompt, height=32, width=48, execution=execution) as session:
            list(session.generate(3, seed=7))
        counts.append(len(compilations) - before)
        videos.append(session.state.latents())
    assert counts[0] == counts[1] > 0 == counts[2]
    torch.testing.assert_close(videos[1], videos[2], atol=1e-5, rtol=1e-4)
    assert not torch.equal(videos[0], videos[1])


def test_more_shapes_than_torch_compiles_by_itself_stay_compiled():
    graphs = []
    torch._dynamo.reset()
    doubled = torch.compile(lambda x: x * 2, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=False)
    for size in range(2, 14):
        with compiled_code(ExecutionConfig(compile=True)):
            doubled(torch.zeros(size))
    torch._dynamo.reset()
    assert len(graphs) == 12
