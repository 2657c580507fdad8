"""Every layout that checkpoints come in gives the same weights, and everything else a plain message."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from builders import SIZE, original_names, scaled_float8, tiny_transformer, with_prefix, write_sparse_safetensors
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from rolling_kv.checkpoints import CheckpointError, build_transformer, inspect_checkpoint, load_model
from rolling_kv.config import PRESETS, CacheConfig, ModelPreset, SamplingConfig
from rolling_kv.files import open_checkpoint
from rolling_kv.layouts import choose_dtype
from rolling_kv.model import CausalModel, kv_bytes_per_frame

DATA = Path(__file__).parents[1] / "data" / "self_forcing"


@pytest.fixture(scope="module")
def source():
    return tiny_transformer()


@pytest.fixture(scope="module")
def weights(source):
    return source.state_dict()


def same(model, weights):
    loaded = model.transformer.state_dict()
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def shuffled(weights):
    return {name: tensor.flip(-1).contiguous() for name, tensor in weights.items()}


FSDP = "model._fsdp_wrapped_module."
FILES = {
    "original.safetensors": lambda w: original_names(w),
    "diffusers.safetensors": lambda w: dict(w),
    "comfyui.safetensors": lambda w: with_prefix("model.diffusion_model.", original_names(w)),
    "comfyui_diffusers.safetensors": lambda w: with_prefix("model.diffusion_model.", w),
    "krea.safetensors": lambda w: with_prefix("model.", original_names(w)),
    "packed.safetensors": lambda w: {
        **with_prefix("model.diffusion_model.", original_names(w)),
        "vae.decoder.conv1.weight": torch.zeros(2, 2),
        "text_encoders.umt5xxl.transformer.shared.weight": torch.zeros(2, 2),
    },
    "bare.pt": lambda w: original_names(w),
    "bare_diffusers.pth": lambda w: dict(w),
    "self_forcing.pt": lambda w: {"generator_ema": with_prefix("model.", original_names(w))},
    "causal_forcing.pt": lambda w: {
        "generator": with_prefix("model.", original_names(shuffled(w))),
        "generator_ema": with_prefix("model.", original_names(w)),
    },
    "longlive.pt": lambda w: {"generator": with_prefix("model.", original_names(w)), "step": 3000},
    "model.pt": lambda w: {"model": original_names(w)},
    "state_dict.ckpt": lambda w: {"state_dict": with_prefix("model.", w), "epoch": 1},
    "nested.pt": lambda w: {"model": {"state_dict": with_prefix("model.diffusion_model.", w)}},
    "fsdp.pt": lambda w: {
        "generator_ema": {
            name.replace("s.0.", "s.0._fsdp_wrapped_module.").replace("s.1.", "s.1._orig_mod."): value
            for name, value in with_prefix(FSDP, original_names(w)).items()
        }
    },
    "compiled.pt": lambda w: with_prefix("_orig_mod.", original_names(w)),
    "compiled_fsdp.pt": lambda w: {"generator": with_prefix("_orig_mod." + FSDP, w)},
}


def write(path, content):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_file_layout_gives_the_same_weights(name, weights, source, tmp_path):
    model = load_model(write(tmp_path / name, FILES[name](weights)))
    assert same(model, weights)
    assert model.identity == CausalModel(source).identity


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
    write(original / "diffusion_pytorch_model.safetensors", original_names(source.state_dict()))
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
    path = write(tmp_path / "a.safetensors", original_names(weights))
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
    model = load_model(write(tmp_path / "a.safetensors", stored_weights))
    name = "blocks.0.attn1.to_q.weight"
    assert model.dtype == getattr(torch, loaded)
    assert torch.equal(model.transformer.state_dict()[name], stored_weights[name].to(model.dtype))


def test_auto_dtype_on_cuda_is_half_precision():
    for stored, loaded in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        tensors = {"a": torch.zeros(9, dtype=getattr(torch, stored)), "b": torch.zeros(2)}
        assert choose_dtype("auto", tensors, "cuda") == getattr(torch, loaded)


def test_auto_dtype_follows_the_device_that_the_model_will_run_on(weights, tmp_path):
    path = write(tmp_path / "a.safetensors", weights)
    model = load_model(path, device="cpu", runs_on="cuda")
    assert (model.dtype, model.compute_device().type) == (torch.bfloat16, "cpu")
    assert load_model(path, dtype="float32", runs_on="cuda").dtype == torch.float32


def test_scaled_float8_is_multiplied_by_its_scales(weights, tmp_path):
    stored, meant = scaled_float8(original_names(weights))
    model = load_model(write(tmp_path / "fp8_scaled.safetensors", stored), dtype="float32")
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
    # 2 (keys and values) x 2 layers x 2x3 tokens x 128 values x 2 bytes
    assert model.kv_bytes_per_frame(32, 48, torch.bfloat16) == 6144
    assert model.kv_bytes_per_frame(32, 48) == 2 * 6144
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 30x48"):
        model.kv_bytes_per_frame(30, 48)
    assert round(kv_bytes_per_frame(30, 1536, 480, 832, torch.bfloat16) / 2**20) == 274


# Presets

CUSTOM = ModelPreset("mine", SamplingConfig(chunk=2, shift=3.0), CacheConfig(10, sink=2))


@pytest.mark.parametrize(
    "name, preset",
    [
        ("self_forcing_dmd.safetensors", "self-forcing"),
        ("Causal-Forcing-framewise.safetensors", "causal-forcing-framewise"),
        ("chunkwise/causal_forcing.safetensors", "causal-forcing-chunkwise"),
        ("framewise/causal_forcing.safetensors", "causal-forcing-framewise"),
        ("longlive_base.safetensors", "longlive"),
        ("longlive/self_forcing.safetensors", "self-forcing"),
        ("LongLive-1.3B/base.safetensors", "longlive"),
        ("krea-realtime-video-14b.safetensors", "krea-realtime"),
        ("Reward-Forcing.safetensors", "reward-forcing"),
        ("model.safetensors", None),
        ("causal_forcing.safetensors", None),
    ],
)
def test_presets_are_known_by_file_name(name, preset, weights, tmp_path):
    path = tmp_path / "models" / name
    path.parent.mkdir(parents=True)
    write(path, weights)
    assert inspect_checkpoint(path).preset == preset
    assert load_model(path).preset == PRESETS[preset or "self-forcing"]


def test_presets_are_read_from_metadata(weights, tmp_path):
    path = tmp_path / "longlive.safetensors"
    save_file(weights, path, {"rolling_kv": json.dumps({"preset": CUSTOM.to_dict()})})
    assert load_model(path).preset == CUSTOM
    assert inspect_checkpoint(path).preset == "mine"
    assert load_model(path, preset="krea-realtime").preset == PRESETS["krea-realtime"]
    other = dataclasses.replace(CUSTOM, name="other")
    assert load_model(path, preset=other).preset == other

    comfyui = tmp_path / "wan.safetensors"
    save_file(weights, comfyui, {"config": json.dumps({"transformer": {"causal_ar": True}})})
    assert load_model(comfyui).preset == PRESETS["causal-forcing-framewise"]


@pytest.mark.parametrize("place", [".", "transformer"])
@pytest.mark.parametrize("level", [".", "transformer"])
def test_presets_are_read_from_a_file_in_or_beside_the_folder(place, level, source, tmp_path):
    source.save_pretrained(tmp_path / "transformer")
    (tmp_path / place / "rolling_kv.json").write_text(json.dumps({"preset": CUSTOM.to_dict()}))
    assert load_model(tmp_path / level).preset == CUSTOM


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"preset": {"chunk": 0}}', "chunk must be at least 1"),
        ('{"preset": {"chunks": 3}}', "unknown preset entries: chunks"),
        ('{"preset": {"chunk": "3"}}', "not usable"),
        ('{"chunk": 3}', 'no entry "preset"'),
        ("{", "not valid JSON"),
        ("[]", "JSON object, not a list"),
    ],
)
def test_a_wrong_preset_file_is_explained(content, message, source, tmp_path):
    source.save_pretrained(tmp_path)
    (tmp_path / "rolling_kv.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"rolling_kv.json.*{message}"):
        load_model(tmp_path)


def test_an_unknown_preset_or_dtype_lists_the_choices(weights, tmp_path):
    path = write(tmp_path / "a.safetensors", weights)
    with pytest.raises(ValueError, match="self-forcing, .*got 'fast'"):
        load_model(path, preset="fast")
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got 'fp4'"):
        load_model(path, dtype="fp4")


# Inspection


def test_inspection_tells_what_a_file_is(weights, tmp_path):
    path = write(tmp_path / "longlive.pt", FILES["fsdp.pt"](weights))
    info = inspect_checkpoint(path, height=32, width=48)
    assert info.layout == "original Wan names, prefix model._fsdp_wrapped_module., wrapper generator_ema"
    assert info.config == {"layers": 2, "dim": 128, "heads": 1, "ffn": 96}
    assert info.parameters == sum(tensor.numel() for tensor in weights.values())
    assert info.dtypes == ("float32",)
    assert info.file_bytes == path.stat().st_size
    assert (info.preset, info.kv_bytes_per_frame) == ("longlive", 6144)


def test_inspection_reads_only_the_header(tmp_path):
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    path = tmp_path / "self_forcing.safetensors"
    write_sparse_safetensors(path, {name: t.shape for name, t in original_names(model.state_dict()).items()})
    assert all(tensor.is_meta for tensor in open_checkpoint(path, values=False).tensors.values())
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    info = inspect_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB, of 2.8 GB
    assert info.config == {"layers": 30, "dim": 1536, "heads": 12, "ffn": 8960}
    assert info.parameters == 1_418_996_800
    assert info.dtypes == ("bfloat16",)
    assert round(info.kv_bytes_per_frame / 2**20) == 274


# Messages


def refused(path, match):
    """The same message from loading and from inspecting, and it names the path."""
    for read in (load_model, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_missing_path_says_what_is_expected(tmp_path):
    refused(tmp_path / "absent.safetensors", "no such file or folder. Expected a .safetensors, .gguf, .pt")
    refused(tmp_path, "holds no weights")
    (tmp_path / "a.onnx").write_bytes(b"ONNX")
    refused(tmp_path / "a.onnx", "type .onnx are not read here")


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({"blocks.0.self_attn.q.lora_A.weight": (4, 8)}, "a LoRA, not a Wan video model. .*load the model"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_down.weight": (4, 8)}, "a LoRA"),
        ({"lora_unet_blocks_0_self_attn_q.lora_down.weight": (4, 8)}, "a LoRA"),
        ({"decoder.conv1.weight": (4, 8), "encoder.conv1.weight": (4, 8)}, "a VAE, not .*the VAE is asked for"),
        ({"decoder.conv_in.weight": (4, 8), "post_quant_conv.weight": (4, 4)}, "a VAE"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 8), "shared.weight": (9, 4)}, "UMT5 text encoder, not"),
        ({"token_embedding.weight": (9, 4), "blocks.0.attn.q.weight": (4, 4)}, "UMT5 text encoder, not"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "a CLIP model"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)}, "another family"),
        ({"model.layers.0.mlp.weight": (4, 6), "lm_head": (9,)}, r"something unknown .*layers.0.mlp.weight \[4, 6\]"),
        ({"blocks.0.self_attn.q.weight": (4, 4)}, "patch_embedding.weight is missing"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_kind_of_file_is_named(tensors, match, suffix, tmp_path):
    path = write(tmp_path / f"file{suffix}", {name: torch.zeros(shape) for name, shape in tensors.items()})
    refused(path, match)


def test_the_lora_of_longlive_is_named(tmp_path):
    lora = {"base_model.model.blocks.0.self_attn.q.lora_A.default.weight": torch.zeros(4, 8)}
    refused(write(tmp_path / "lora.pt", {"generator_lora": lora, "step": 1}), "a LoRA")


def test_other_wan_models_are_named(tmp_path):
    image = tiny_transformer(in_channels=36, out_channels=16, image_dim=8, added_kv_proj_dim=128)
    refused(write(tmp_path / "i2v.safetensors", dict(image.state_dict())), "image-conditioned .*36 input channels")
    control = tiny_transformer(in_channels=48, out_channels=16)
    refused(write(tmp_path / "control.safetensors", original_names(control.state_dict())), "image-conditioned .*48 i")
    with torch.device("meta"):
        big = WanTransformer3DModel(num_attention_heads=24, in_channels=48, out_channels=48, num_layers=30)
    shapes = {name: tensor.shape for name, tensor in original_names(big.state_dict()).items()}
    write_sparse_safetensors(tmp_path / "ti2v.safetensors", shapes)
    with pytest.raises(CheckpointError, match="Wan 2.2 5B model .dim 3072, 48 latent channels"):
        inspect_checkpoint(tmp_path / "ti2v.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_recognised(suffix, kept, weights, tmp_path):
    path = write(tmp_path / f"file{suffix}", weights)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path, "damaged or incomplete .*Download it again")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_downloads_that_went_wrong_are_recognised(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(path, "Git LFS pointer")
    path.write_text("<!doctype html><html>Access denied</html>")
    refused(path, "a web page")


def test_missing_surplus_and_misshapen_tensors_are_listed(weights, tmp_path):
    changed = original_names(weights)
    del changed["blocks.0.ffn.2.bias"]
    changed["blocks.1.cross_attn.k.weight"] = torch.zeros(64, 128)
    changed |= {f"vace_blocks.{i}.weight": torch.zeros(i + 1, 2) for i in range(4)}
    path = write(tmp_path / "file.safetensors", changed)
    refused(path, r"1 missing: blocks.0.ffn.net.2.bias \[128\]")
    refused(path, r"4 that do not belong there: vace_blocks.0.weight \[1, 2\], .* and 1 more")
    refused(path, r"1 of the wrong shape: blocks.1.attn2.to_k.weight \[64, 128\], expected \[128, 128\]")


def test_layers_that_a_folder_promises_must_be_there(source, weights, tmp_path):
    source.save_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.")}
    write(tmp_path / "diffusion_pytorch_model.safetensors", kept)
    refused(tmp_path, r"27 missing: blocks.1")


def test_a_missing_shard_is_named(source, tmp_path):
    source.save_pretrained(tmp_path, max_shard_size="300KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, f"1 of them are not in the folder .{lost.name}")


def test_a_folder_with_several_files_asks_for_one(weights, tmp_path):
    write(tmp_path / "a.safetensors", weights)
    write(tmp_path / "b.safetensors", weights)
    refused(tmp_path, "several weight files .a.safetensors, b.safetensors")


def test_weights_quantised_otherwise_are_refused(weights, tmp_path):
    changed = dict(weights) | {"blocks.0.attn1.to_q.weight": torch.zeros(128, 64, dtype=torch.uint8)}
    refused(write(tmp_path / "nf4.safetensors", changed), "quantised .*to_q.weight is uint8")


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped, weights, tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "model.pt"
    torch.save({"generator": weights, "extra": Payload(trace)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"more than tensors \(_?io.open.* it was not. Use the model's .safetensors")
    path.write_bytes(pickle.dumps(Payload(trace)))
    refused(path, "more than tensors")
    assert not trace.exists()


def test_a_pickle_without_tensors_is_explained(tmp_path):
    refused(write(tmp_path / "a.pt", {"step": 1, "lr": 0.1}), "no tensors; its entries are step, lr")
    refused(write(tmp_path / "b.pt", [torch.zeros(2)]), "holds a list where named tensors")


def test_the_same_tensor_under_two_prefixes_is_refused(weights):
    with pytest.raises(CheckpointError, match="twice, under different prefixes"):
        build_transformer(dict(weights) | with_prefix("model.", weights))
