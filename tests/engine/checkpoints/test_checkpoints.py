"""Every layout that checkpoints come in gives the same weights."""

import json
from pathlib import Path

import pytest
import torch
from builders import CHECKPOINTS, SIZE, original_names, scaled_float8, shuffled, tiny_transformer, write_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from rolling_kv.checkpoints.dtypes import choose_dtype
from rolling_kv.checkpoints.model import CausalModel, load_model
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.geometry import WAN_22
from rolling_kv.inspection import inspect_checkpoint
from rolling_kv.platforms import Platform
from rolling_kv.presets import PRESETS

DATA = Path(__file__).parents[2] / "data" / "self_forcing"


@pytest.fixture(scope="module")
def source():
    return tiny_transformer()


@pytest.fixture(scope="module")
def weights(source):
    return source.state_dict()


def same(model, weights):
    loaded = model.transformer.state_dict()
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_file_layout_gives_the_same_weights(name, weights, source, tmp_path):
    model = load_model(write_weights(tmp_path / name, CHECKPOINTS[name](weights)))
    assert same(model, weights)
    assert model.identity == CausalModel(source).identity


LATENTS_22 = dict(in_channels=48, out_channels=48)


@pytest.mark.parametrize("name", ["original.safetensors", "comfyui.safetensors", "causal_forcing.pt", "folder"])
def test_models_with_the_latents_of_wan_2_2_load(name, tmp_path):
    source = tiny_transformer(**LATENTS_22)
    if name == "folder":
        source.save_pretrained(tmp_path / name)
    else:
        write_weights(tmp_path / name, CHECKPOINTS[name](source.state_dict()))
    model = load_model(tmp_path / name, preset="auto")
    assert same(model, source.state_dict()) and model.geometry == WAN_22


def test_the_weights_of_wan_2_2_may_be_float8(tmp_path):
    stored, meant = scaled_float8(original_names(tiny_transformer(**LATENTS_22).state_dict()))
    model = load_model(write_weights(tmp_path / "fp8.safetensors", stored), dtype="float32")
    assert model.geometry == WAN_22 and model.preset == PRESETS["longlive2"]
    assert torch.equal(model.transformer.proj_out.weight, meant["head.head.weight"])
    assert torch.equal(model.transformer.blocks[1].ffn.net[2].weight, meant["blocks.1.ffn.2.weight"])


@pytest.mark.parametrize("place", ["model.sft", "folder/model.SFT"])
def test_sft_is_another_name_of_safetensors(place, weights, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    write_weights(tmp_path / "model.safetensors", original_names(weights)).rename(path)
    assert same(load_model(path), weights)
    if path.suffix == ".sft":
        folder = tmp_path / "only"
        folder.mkdir()
        path.rename(folder / "weights.sft")
        assert same(load_model(folder), weights)


def test_a_pickle_of_the_old_format_loads(weights, tmp_path):
    torch.save({"generator": original_names(weights)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(load_model(tmp_path / "old.pt"), weights)


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_a_diffusers_folder_loads_from_either_level(shard, weights, source, tmp_path):
    source.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size=shard)
    files = list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))
    assert len(files) == 1 if shard == "10GB" else len(files) > 2
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        model = load_model(path)
        assert same(model, weights)
        assert model.identity == CausalModel(source).identity


def test_heads_come_from_the_config_of_a_folder(tmp_path):
    source = tiny_transformer(num_attention_heads=4, attention_head_dim=16)
    source.save_pretrained(tmp_path / "diffusers")
    assert load_model(tmp_path / "diffusers").transformer.config.num_attention_heads == 4

    original = tmp_path / "original"
    original.mkdir()
    write_weights(original / "diffusion_pytorch_model.safetensors", original_names(source.state_dict()))
    (original / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 64, "num_heads": 4}))
    model = load_model(original)
    assert same(model, source.state_dict())
    assert model.transformer.config.attention_head_dim == 16
    assert model.identity == load_model(tmp_path / "diffusers").identity


def test_heads_come_from_metadata_or_the_caller(tmp_path):
    source = tiny_transformer(num_attention_heads=4, attention_head_dim=16)
    path = tmp_path / "small.safetensors"
    save_file(source.state_dict(), path, {"config": json.dumps({"transformer": {"num_heads": 4, "causal_ar": True}})})
    assert load_model(path).transformer.config.num_attention_heads == 4
    save_file(source.state_dict(), path)
    assert load_model(path, config={"num_attention_heads": 4}).transformer.config.attention_head_dim == 16
    with pytest.raises(CheckpointError, match="width of this model is 64.*num_attention_heads"):
        load_model(path)


def test_the_original_release_has_the_affine_norm_under_another_name():
    path = sorted(DATA.glob("weights_*.safetensors"))[0]
    original = load_file(path)
    model = load_model(path, config={"num_heads": 4}, dtype="float32").transformer
    original = {name: tensor.float() for name, tensor in original.items()}
    assert torch.equal(model.blocks[1].norm2.weight, original["blocks.1.norm3.weight"])
    assert torch.equal(model.blocks[1].attn2.to_q.weight, original["blocks.1.cross_attn.q.weight"])
    assert torch.equal(model.proj_out.weight, original["head.head.weight"])


def test_a_loaded_model_computes_what_its_source_does(source, weights, tmp_path):
    path = write_weights(tmp_path / "a.safetensors", original_names(weights))
    inputs = dict(
        hidden_states=torch.randn(1, 16, 3, 8, 8),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 7, SIZE["text_dim"]),
    )
    with torch.inference_mode():
        model = load_model(path)
        assert torch.equal(model.transformer(**inputs).sample, source(**inputs).sample)
    assert not any(parameter.is_inference() or parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_half_precision_leaves_norms_and_time_embedding_in_float32(weights):
    kept = {
        "condition_embedder.time_embedder.linear_1.weight",
        "condition_embedder.time_embedder.linear_2.bias",
        "scale_shift_table",
        "blocks.1.scale_shift_table",
        "blocks.1.norm2.weight",
    }
    dtypes = {name: tensor.dtype for name, tensor in build_transformer(weights, dtype="float16").state_dict().items()}
    assert {dtypes[name] for name in kept} == {torch.float32}
    for name in ("condition_embedder.time_proj.weight", "blocks.1.attn1.norm_q.weight", "proj_out.weight"):
        assert dtypes[name] == torch.float16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_parts_that_diffusers_keeps(dtype, source, tmp_path):
    pytest.importorskip("accelerate")  # from_pretrained asks for it, the engine does not
    source.save_pretrained(tmp_path)
    expected = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype))
    model = load_model(tmp_path, dtype=dtype)
    assert same(model, expected.state_dict())
    assert {name: p.dtype for name, p in model.transformer.named_parameters()} == {
        name: p.dtype for name, p in expected.named_parameters()
    }
    assert model.dtype == getattr(torch, dtype)
    assert model.transformer.blocks[0].norm2.weight.dtype == torch.float32


@pytest.mark.parametrize("stored, loaded", [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"),
                                            ("float8_e4m3fn", "bfloat16"), ("float8_e5m2", "bfloat16")])  # fmt: skip
def test_auto_dtype_is_the_dtype_of_the_file(stored, loaded, weights, tmp_path):
    stored_weights = {name: tensor.to(getattr(torch, stored)) for name, tensor in weights.items()}
    model = load_model(write_weights(tmp_path / "a.safetensors", stored_weights))
    name = "blocks.0.attn1.to_q.weight"
    assert model.dtype == getattr(torch, loaded)
    assert torch.equal(model.transformer.state_dict()[name], stored_weights[name].to(model.dtype))


@pytest.mark.parametrize("avx2", [False, True])
def test_auto_dtype_says_where_a_processor_is_slow_in_it(avx2, weights, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("rolling_kv.checkpoints.dtypes.AVX2", avx2)
    half = write_weights(tmp_path / "a.safetensors", {name: tensor.bfloat16() for name, tensor in weights.items()})
    load_model(half, preset="self-forcing", runs_on="cuda")
    load_model(half, preset="self-forcing", dtype="bfloat16")
    load_model(half, preset="self-forcing", dtype="float32")
    load_model(write_weights(tmp_path / "b.safetensors", weights), preset="self-forcing")
    assert not caplog.records
    load_model(half, preset="self-forcing")
    assert ("multiplies bfloat16" in caplog.text) is avx2


def test_auto_dtype_on_cuda_is_half_precision():
    for stored, loaded in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        tensors = {"a": torch.zeros(9, dtype=getattr(torch, stored)), "b": torch.zeros(2)}
        assert choose_dtype("auto", tensors, "cuda") == getattr(torch, loaded)


def test_auto_dtype_is_float16_where_there_is_no_bfloat16(monkeypatch):
    monkeypatch.setattr("rolling_kv.checkpoints.dtypes.platform_of", lambda device: Platform("cuda", (7, 5)))
    for stored in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        tensors = {"a": torch.zeros(9).to(getattr(torch, stored))}
        assert choose_dtype("auto", tensors, "cuda") == torch.float16
        assert choose_dtype("bfloat16", tensors, "cuda") == torch.bfloat16


def test_auto_dtype_follows_the_device_that_the_model_will_run_on(weights, tmp_path):
    path = write_weights(tmp_path / "a.safetensors", weights)
    model = load_model(path, device="cpu", runs_on="cuda")
    assert (model.dtype, model.compute_device().type) == (torch.bfloat16, "cpu")
    assert load_model(path, dtype="float32", runs_on="cuda").dtype == torch.float32


def test_scaled_float8_is_multiplied_by_its_scales(weights, tmp_path):
    stored, meant = scaled_float8(original_names(weights))
    model = load_model(write_weights(tmp_path / "fp8_scaled.safetensors", stored), dtype="float32")
    assert same(model, build_transformer(meant).state_dict())
    assert "float8_e4m3fn" in inspect_checkpoint(tmp_path / "fp8_scaled.safetensors").dtypes


def test_the_identity_tells_weights_and_dtypes_apart(source, weights):
    def identity(weights, **kwargs):
        return CausalModel(build_transformer(weights, **kwargs)).identity

    assert identity(weights) == identity(original_names(weights)) == CausalModel(source).identity
    assert identity(weights) != identity(shuffled(weights))
    assert identity(weights) != identity(weights, dtype="bfloat16")
    assert identity(weights) != identity(weights, config={"num_attention_heads": 2})
    assert identity(weights, dtype="bfloat16") == identity(original_names(weights), dtype=torch.bfloat16)


def test_a_model_is_a_plain_holder(source):
    model = CausalModel(source)
    model.device = torch.device("cpu")
    assert model.compute_device() == torch.device("cpu")
    assert model.preset == PRESETS["self-forcing"]
