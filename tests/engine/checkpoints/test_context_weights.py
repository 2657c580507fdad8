"""A second set of weights, for context passes: read from the names that Self Gradient Forcing Plus gives it."""

import re

import pytest
import torch
from builders import original_names, shuffled, tiny_transformer, with_prefix, write_weights

from rolling_kv.checkpoints.model import CausalModel, load_model
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.inspection import inspect_checkpoint
from rolling_kv.lora.reader import load_lora
from rolling_kv.lora.stack import LoraStack
from rolling_kv.presets import PRESETS

PARTS = "patch_embedding|text_embedding|time_embedding|time_projection|head"


def memory_names(weights):
    """The names of the second set, from those of the first: as the release has them."""
    renamed = {}
    for name, tensor in original_names(weights).items():
        renamed[re.sub(rf"^(?=({PARTS})\b)|(?<=\.)(?=(modulation|weight|bias)$)", "memory_", name, count=1)] = tensor
    return renamed


@pytest.fixture(scope="module")
def first():
    return tiny_transformer()


@pytest.fixture(scope="module")
def second(first):
    twin = tiny_transformer()
    twin.load_state_dict(shuffled(first.state_dict()))
    return twin


@pytest.fixture
def content(first, second):
    return original_names(first.state_dict()) | memory_names(second.state_dict())


def same(transformer, source):
    loaded, weights = transformer.state_dict(), source.state_dict()
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_names_of_the_release():
    names = memory_names(tiny_transformer().state_dict())
    assert {"memory_patch_embedding.weight", "memory_head.modulation", "blocks.0.memory_modulation"} <= names.keys()
    assert {"blocks.1.self_attn.q.memory_weight", "blocks.1.norm3.memory_bias", "memory_head.head.bias"} <= names.keys()
    assert all(name.count("memory_") == 1 for name in names)


@pytest.mark.parametrize("file", ["chunkwise/model.pt", "framewise/model.pt", "plain.safetensors", "fsdp.pt"])
def test_both_sets_load_from_every_layout(file, first, second, content, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".pt":
        prefix = "model._fsdp_wrapped_module." if path.stem == "fsdp" else "model."
        content = {"generator_ema": with_prefix(prefix, content)}
    model = load_model(write_weights(path, content))
    assert same(model.transformer, first) and same(model.context_transformer, second)
    assert model.identity == CausalModel(first, context_transformer=second).identity
    assert model.preset is PRESETS[f"self-gradient-forcing-plus-{'frame' if 'framewise' in file else 'chunk'}wise"]
    assert not model.note


def test_the_identity_is_of_both_sets(first, second):
    alone, both, twice = CausalModel(first), CausalModel(first, None, "", second), CausalModel(first, None, "", first)
    assert len({alone.identity, both.identity, twice.identity}) == 3
    assert alone.transformers == (first,) and both.transformers == (first, second)


def test_the_bytes_of_both_sets_are_those_of_the_model(first, second):
    def size(model):
        return sum(tensor.nbytes for tensor in model.state_dict().values())

    assert size(CausalModel(first, context_transformer=second)) == 2 * size(CausalModel(first))


def test_inspection_counts_both(first, content, tmp_path):
    one = inspect_checkpoint(write_weights(tmp_path / "one.safetensors", original_names(first.state_dict())))
    two = inspect_checkpoint(write_weights(tmp_path / "two.safetensors", content))
    assert two.parameters == 2 * one.parameters and two.config == one.config
    assert "a second set of weights for context passes" in two.layout
    assert two.preset == "self-gradient-forcing-plus-chunkwise"
    assert two.run.prompts == 2 * one.run.prompts


@pytest.mark.parametrize("storage, dtype", [("float8", "bfloat16"), ("model", "bfloat16")])
def test_both_are_stored_alike(storage, dtype, content, tmp_path):
    model = load_model(write_weights(tmp_path / "plus.safetensors", content), storage=storage, dtype=dtype)
    own, twin = (transformer.state_dict() for transformer in model.transformers)
    assert {name: tensor.dtype for name, tensor in own.items()} == {name: tensor.dtype for name, tensor in twin.items()}
    assert (own["blocks.0.attn1.to_q.weight"].dtype == torch.float8_e4m3fn) == (storage == "float8")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop("blocks.1.self_attn.q.memory_weight"),
            "context passes: .*1 missing: blocks.1.attn1.to_q.weight",
        ),
        (lambda w: [w.pop(name) for name in list(w) if "memory" in name and ".1." in name], "context passes"),
        (lambda w: w.pop("blocks.1.self_attn.q.weight"), "1 missing: blocks.1.attn1.to_q.weight"),
    ],
)
def test_half_a_set_is_refused(change, message, content, tmp_path):
    change(content)
    with pytest.raises(CheckpointError, match=message):
        load_model(write_weights(tmp_path / "plus.safetensors", content))


def test_fewer_layers_in_the_second_set_are_refused(content, tmp_path):
    for name in [name for name in content if name.startswith("blocks.1.") and "memory_" in name]:
        del content[name]
    with pytest.raises(CheckpointError, match=r"1 layers, 2 in the first"):
        load_model(write_weights(tmp_path / "plus.safetensors", content))


@pytest.mark.parametrize("fuse", [True, False])
def test_a_lora_changes_both_and_leaves_both(fuse, first, second, tmp_path):
    name, model = "blocks.0.attn1.to_q", CausalModel(first, context_transformer=second)
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    weights = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    lora = load_lora(write_weights(tmp_path / "lora.safetensors", weights))
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in model.transformers]
    x, stack = torch.randn(1, 3, 128), LoraStack(model, fuse)
    plain = [part.get_submodule(name)(x) for part in model.transformers]
    stack.set([(lora, 1.0)])
    for part, was in zip(model.transformers, plain):
        torch.testing.assert_close(part.get_submodule(name)(x) - was, x @ down.T @ up.T, atol=1e-3, rtol=1e-3)
    stack.clear()
    for part, was in zip(model.transformers, before):
        assert part.state_dict().keys() == was.keys()
        assert all(torch.equal(part.state_dict()[key], was[key]) for key in was)


def test_both_stay_packed_in_gguf(content, tmp_path):
    pytest.importorskip("gguf")
    from gguf_files import Kind, write_gguf

    write_gguf(tmp_path / "plus.gguf", content, Kind.Q8_0)
    model = load_model(tmp_path / "plus.gguf")
    for part in model.transformers:
        assert part.get_parameter("blocks.0.attn1.to_q.weight").quant_type == Kind.Q8_0
    assert model.preset.name == "self-gradient-forcing-plus-chunkwise"
