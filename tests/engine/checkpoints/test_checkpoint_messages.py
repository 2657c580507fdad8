"""What a checkpoint is, from its header alone, and a plain message for every file that is no usable model."""

import pickle

import pytest
import torch
from builders import CHECKPOINTS, original_names, tiny_transformer, with_prefix, write_sparse_safetensors, write_weights
from diffusers import WanTransformer3DModel

from rolling_kv.checkpoints.model import load_model
from rolling_kv.checkpoints.readers import CheckpointError, open_checkpoint
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.geometry import WAN_22
from rolling_kv.inspection import inspect_checkpoint
from rolling_kv.presets import PRESETS


@pytest.fixture(scope="module")
def source():
    return tiny_transformer()


@pytest.fixture(scope="module")
def weights(source):
    return source.state_dict()


# Inspection


def test_inspection_tells_what_a_file_is(weights, tmp_path):
    path = write_weights(tmp_path / "longlive.pt", CHECKPOINTS["fsdp.pt"](weights))
    info = inspect_checkpoint(path, height=32, width=48)
    assert info.layout == "original Wan names, prefix model._fsdp_wrapped_module., wrapper generator_ema"
    assert info.config == {"layers": 2, "dim": 128, "heads": 1, "ffn": 96}
    assert info.parameters == sum(tensor.numel() for tensor in weights.values())
    assert info.dtypes == ("float32",)
    assert info.file_bytes == path.stat().st_size
    # 2 (keys and values) x 2 layers x 2x3 tokens x 128 values x 2 bytes
    assert (info.preset, info.kv_bytes_per_frame) == ("longlive", 6144)
    assert info.settings == PRESETS["longlive"] and info.run.cache == 12 * 6144
    with pytest.raises(ValueError, match="height must be a multiple of 16 pixels, got 30"):
        inspect_checkpoint(path, height=30, width=48)


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
    path = write_weights(tmp_path / f"file{suffix}", {name: torch.zeros(shape) for name, shape in tensors.items()})
    refused(path, match)


def test_the_lora_of_longlive_is_named(tmp_path):
    lora = {"base_model.model.blocks.0.self_attn.q.lora_A.default.weight": torch.zeros(4, 8)}
    refused(write_weights(tmp_path / "lora.pt", {"generator_lora": lora, "step": 1}), "a LoRA")


def test_other_wan_models_are_named(tmp_path):
    image = tiny_transformer(in_channels=36, out_channels=16, image_dim=8, added_kv_proj_dim=128)
    refused(
        write_weights(tmp_path / "i2v.safetensors", dict(image.state_dict())), "image-conditioned .*36 input channels"
    )
    control = tiny_transformer(in_channels=48, out_channels=16)
    refused(
        write_weights(tmp_path / "control.safetensors", original_names(control.state_dict())),
        "image-conditioned .*48 i",
    )
    fun = tiny_transformer(in_channels=100, out_channels=48)
    refused(write_weights(tmp_path / "fun.pt", fun.state_dict()), "image-conditioned .*100 input .*instead of 48")
    other = tiny_transformer(in_channels=12, out_channels=12)
    refused(
        write_weights(tmp_path / "other.pt", other.state_dict()),
        r"latents have 12 channels; those of a Wan model have 16 \(Wan 2.1\) or 48 \(Wan 2.2 5B\)",
    )


def test_weights_in_nvfp4_are_named(tmp_path):
    weights = {"blocks.0.self_attn.q.quantized_weight_values": torch.zeros(4), "patch_embedding.bias": torch.zeros(4)}
    refused(write_weights(tmp_path / "model_4o6.pt", {"generator": weights}), "packed as NVFP4 .*model_bf16.pt")


def test_the_5b_of_wan_2_2_is_told_by_its_channels(tmp_path):
    with torch.device("meta"):
        big = WanTransformer3DModel(
            num_attention_heads=24, in_channels=48, out_channels=48, num_layers=30, ffn_dim=14336
        )
    shapes = {name: tensor.shape for name, tensor in original_names(big.state_dict()).items()}
    write_sparse_safetensors(tmp_path / "wan2.2_ti2v_5B_fp16.safetensors", shapes)
    info = inspect_checkpoint(tmp_path / "wan2.2_ti2v_5B_fp16.safetensors")
    assert info.config == {"layers": 30, "dim": 3072, "heads": 24, "ffn": 14336}
    assert info.geometry == WAN_22 and (info.height, info.width) == (704, 1280)
    assert info.kv_bytes_per_frame == 30 * 2 * 880 * 3072 * 2  # layers, keys and values, tokens, dim, bytes
    assert info.preset is None and info.settings == PRESETS["longlive2"]
    assert "ordinary Wan model" in info.note and "treated as longlive2 (chunks of 8, window 32" in info.note


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_recognised(suffix, kept, weights, tmp_path):
    path = write_weights(tmp_path / f"file{suffix}", weights)
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
    path = write_weights(tmp_path / "file.safetensors", changed)
    refused(path, r"1 missing: blocks.0.ffn.net.2.bias \[128\]")
    refused(path, r"4 that do not belong there: vace_blocks.0.weight \[1, 2\], .* and 1 more")
    refused(path, r"1 of the wrong shape: blocks.1.attn2.to_k.weight \[64, 128\], expected \[128, 128\]")


def test_layers_that_a_folder_promises_must_be_there(source, weights, tmp_path):
    source.save_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.")}
    write_weights(tmp_path / "diffusion_pytorch_model.safetensors", kept)
    refused(tmp_path, r"27 missing: blocks.1")


def test_a_missing_shard_is_named(source, tmp_path):
    source.save_pretrained(tmp_path, max_shard_size="300KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, f"1 of them are not in the folder .{lost.name}")


def test_a_folder_with_several_files_asks_for_one(weights, tmp_path):
    write_weights(tmp_path / "a.safetensors", weights)
    write_weights(tmp_path / "b.safetensors", weights)
    refused(tmp_path, "several weight files .a.safetensors, b.safetensors")


def test_weights_quantised_otherwise_are_refused(weights, tmp_path):
    changed = dict(weights) | {"blocks.0.attn1.to_q.weight": torch.zeros(128, 64, dtype=torch.uint8)}
    refused(write_weights(tmp_path / "nf4.safetensors", changed), "quantised .*to_q.weight is uint8")


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
    refused(write_weights(tmp_path / "a.pt", {"step": 1, "lr": 0.1}), "no tensors; its entries are step, lr")
    refused(write_weights(tmp_path / "b.pt", [torch.zeros(2)]), "holds a list where named tensors")


def test_the_same_tensor_under_two_prefixes_is_refused(weights):
    with pytest.raises(CheckpointError, match="twice, under different prefixes"):
        build_transformer(dict(weights) | with_prefix("model.", weights))
