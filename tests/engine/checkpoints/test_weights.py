"""Weights in float8 and from GGUF files: bounded errors, measured bytes, and one layer unpacked at a time."""

import struct
import weakref

import pytest
import torch
from builders import original_names, scaled_float8, tiny_transformer, with_prefix
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rolling_kv.checkpoints import gguf as weights_module
from rolling_kv.checkpoints import transformer as loading
from rolling_kv.checkpoints.model import CausalModel, load_model
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.float8_linear import Float8Linear
from rolling_kv.geometry import WAN_22
from rolling_kv.inspection import inspect_checkpoint
from rolling_kv.lora.reader import read_lora
from rolling_kv.lora.stack import applied_loras
from rolling_kv.presets import PRESETS
from rolling_kv.sampling.session import RollingSession

gguf = pytest.importorskip("gguf")
from diffusers.quantizers.gguf import utils as gguf_utils  # noqa: E402
from gguf_files import k_quant, packable, write_gguf  # noqa: E402

Kind = gguf.GGMLQuantizationType
SIZE = dict(num_attention_heads=2, ffn_dim=512)  # 256 wide: a row is a whole number of blocks of every packing
LAYERS = [name for name, layer in tiny_transformer(**SIZE).blocks.named_modules() if isinstance(layer, nn.Linear)]
PROMPT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(4))
SAMPLING = SamplingConfig(chunk=1, denoising_steps=(1000, 500))


@pytest.fixture(scope="module")
def weights():
    return tiny_transformer(**SIZE).state_dict()


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(weights, path)
    return path


def in_blocks(weights):
    """Names of the weights of the Linear layers of the blocks."""
    return [f"blocks.{name}.weight" for name in LAYERS if f"blocks.{name}.weight" in weights]


def video(model):
    with RollingSession(model, PROMPT, height=32, width=48, sampling=SAMPLING, cache=CacheConfig(3, sink=1)) as session:
        for _ in session.generate(4, seed=1):
            pass
    return session.state.latents()


def flow(model):
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        return model.transformer(
            torch.randn(1, 16, 3, 8, 8, generator=generator).to(model.dtype),
            torch.tensor([500.0]),
            PROMPT.to(model.dtype),
            return_dict=False,
        )[0].float()


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def nbytes(model):
    return sum(tensor.nbytes for tensor in model.transformer.state_dict().values())


# float8


def test_float8_halves_the_blocks_and_changes_little(checkpoint):
    full, model = (load_model(checkpoint, dtype="bfloat16", storage=storage) for storage in ("model", "float8"))
    weights = model.transformer.state_dict()
    assert {weights[name].dtype for name in in_blocks(weights)} == {torch.float8_e4m3fn}
    assert {t.dtype for name, t in weights.items() if name.endswith(("patch_embedding.weight", "proj_out.weight",
            "norm_q.weight", "time_proj.weight"))} == {torch.bfloat16}  # fmt: skip
    assert weights["blocks.0.norm2.weight"].dtype == torch.float32
    assert model.dtype == torch.bfloat16
    linears = sum(t.numel() for name, t in weights.items() if t.dtype == torch.float8_e4m3fn)
    assert nbytes(full) - nbytes(model) == linears > nbytes(full) / 3
    assert 0.002 < distance(flow(model), flow(full)) < 0.012
    assert model.identity != full.identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float8_works_with_the_rolling_cache(dtype, checkpoint):
    model = load_model(checkpoint, dtype=dtype, storage="float8")
    latents = video(model)
    assert latents.dtype == model.dtype == getattr(torch, dtype)
    assert 1e-3 < distance(latents, video(load_model(checkpoint, dtype=dtype))) < 0.015
    assert torch.equal(latents, video(model))
    weights = model.transformer.state_dict()
    assert {weights[name].dtype for name in in_blocks(weights)} == {torch.float8_e4m3fn}


def test_float8_computes_what_rounded_weights_do(checkpoint, weights):
    rounded = dict(weights)
    for name in in_blocks(weights):
        for part in (name, name.removesuffix("weight") + "bias"):
            rounded[part] = weights[part].to(torch.float8_e4m3fn).float()
    other = load_model(checkpoint)
    other.transformer.load_state_dict(rounded)
    # Plain weights meet a fused product, which rounds differently.
    torch.testing.assert_close(video(load_model(checkpoint, storage="float8")), video(other), atol=1e-5, rtol=1e-5)


def test_one_layer_at_a_time_leaves_float8(checkpoint, monkeypatch):
    model = load_model(checkpoint, dtype="bfloat16", storage="float8")
    layers = [model.transformer.blocks.get_submodule(name) for name in LAYERS]
    seen, wide = [], weakref.WeakSet()
    widened = Float8Linear.widened

    def counting(layer, dtype):
        wide.add(weight := widened(layer, dtype))
        seen.append(len(wide))
        return weight

    monkeypatch.setattr(Float8Linear, "widened", counting)
    flow(model)
    assert len(seen) >= len(layers) and max(seen) == 1
    assert all(layer.weight.dtype == torch.float8_e4m3fn for layer in layers)


def test_a_call_of_a_float8_layer_reads_each_weight_once_and_writes_it_once():
    """A byte read and two written for each, as bfloat16, and nothing is narrowed afterwards."""
    layer = Float8Linear.of(nn.Linear(256, 128, device="meta"))
    with Traffic() as traffic:
        layer(torch.empty(3, 256, dtype=torch.bfloat16, device="meta"))
    assert traffic.casts == [
        (torch.float8_e4m3fn, torch.bfloat16, 128),
        (torch.float8_e4m3fn, torch.bfloat16, 256 * 128),
    ]


class Traffic(TorchDispatchMode):
    """Notes what is cast from which dtype to which, and how many values."""

    def __init__(self):
        super().__init__()
        self.casts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.casts.append((args[0].dtype, made.dtype, made.numel()))
        return made


@pytest.mark.parametrize("rows", [False, True])
def test_a_scaled_file_keeps_its_scales_in_float8(rows, weights, tmp_path):
    stored, meant = scaled_float8(weights)
    if rows:
        for name in in_blocks(weights):
            scale = weights[name].abs().amax(1, keepdim=True) / 448
            stored[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            meant[name] = stored[name].float() * scale
    for name in in_blocks(weights):
        part = name.removesuffix("weight") + "bias"
        meant[part] = meant[part].to(torch.float8_e4m3fn).float()
    save_file(stored, tmp_path / "scaled.safetensors")
    model = load_model(tmp_path / "scaled.safetensors", dtype="float32", storage="float8")
    for name in in_blocks(weights):
        layer = model.transformer.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight.view(torch.uint8), stored[name].view(torch.uint8))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(layer.widened(dtype), meant[name].to(dtype))
    other = tiny_transformer(**SIZE)
    other.load_state_dict(meant)
    assert distance(flow(model), flow(CausalModel(other))) < 1e-6
    latents = video(model)
    assert torch.equal(latents, video(model)) and model.identity != CausalModel(other).identity


def test_loading_widens_one_weight_at_a_time(weights, tmp_path, monkeypatch):
    stored = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    save_file(stored, tmp_path / "float8.safetensors")
    load, wide, most = loading.load_tensor, weakref.WeakSet(), []

    def counting(tensor, *args, **options):
        loaded = load(tensor, *args, **options)
        if loaded.ndim == 2 and loaded.shape == (256, 256):
            wide.add(loaded)
        most.append(sum(tensor.dtype != torch.float8_e4m3fn for tensor in wide))
        return loaded

    monkeypatch.setattr(loading, "load_tensor", counting)
    made = load_model(tmp_path / "float8.safetensors", storage="float8").transformer.state_dict()
    inside = in_blocks(weights)
    assert max(most) <= 3  # the one at hand, and what lies outside of the blocks
    assert all(torch.equal(made[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in inside)


def test_a_weight_that_is_no_number_is_refused_before_it_is_narrowed(weights, tmp_path):
    broken = weights | {"blocks.1.ffn.net.2.weight": torch.full_like(weights["blocks.1.ffn.net.2.weight"], torch.nan)}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="no numbers .*blocks.1.ffn.net.2.weight"):
        load_model(tmp_path / "broken.safetensors", storage="float8")


# GGUF


@pytest.mark.parametrize("kind, bound, bits", [(Kind.Q8_0, 0.002, 8.5), (Kind.Q5_1, 0.012, 6), (Kind.Q4_0, 0.03, 4.5)])
def test_a_gguf_file_stays_packed_and_changes_little(kind, bound, bits, weights, checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    meant = write_gguf(path, weights, kind)
    full, model = load_model(checkpoint), load_model(path, dtype="float32")
    assert bound / 10 < distance(flow(model), flow(full)) < bound
    assert distance(video(model), video(full)) < bound
    packed = sum(t.numel() for name, t in original_names(weights).items() if packable(name, t, kind))
    plain = sum(t.numel() for t in weights.values()) - packed
    assert nbytes(model) == packed * bits / 8 + 4 * plain
    # Unpacked in float16, as the scales are: to rounding what the file's own library unpacks.
    other = load_model(checkpoint)
    other.transformer.load_state_dict(build_transformer(meant).state_dict())
    assert distance(flow(model), flow(other)) < bound / 10


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_unpacked(kind, weights, checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    meant = write_gguf(path, weights, kind, pack=k_quant)
    other = load_model(checkpoint)
    other.transformer.load_state_dict(build_transformer(meant).state_dict())
    model = load_model(path, dtype="float32")
    assert inspect_checkpoint(path).dtypes[0] == kind.name
    assert distance(flow(model), flow(other)) < 1e-3
    assert distance(flow(model), flow(load_model(checkpoint))) > 0.1


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_gguf_file_works_with_the_rolling_cache(prefix, weights, checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, weights, Kind.Q8_0, prefix)
    model = load_model(path)
    dtypes = {name: tensor.dtype for name, tensor in model.transformer.state_dict().items()}
    assert model.dtype == dtypes["blocks.0.attn1.norm_q.weight"] == dtypes["proj_out.weight"] == torch.bfloat16
    assert dtypes["blocks.0.norm2.weight"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert {dtypes[name] for name in in_blocks(dtypes)} == {torch.uint8}
    latents = video(model)
    assert latents.dtype == torch.bfloat16
    assert torch.equal(latents, video(model))
    assert distance(latents, video(load_model(checkpoint, dtype="bfloat16"))) < 0.015
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.identity == load_model(path).identity != load_model(path, dtype="float16").identity


def test_a_gguf_file_of_the_5b_of_wan_2_2_is_told_by_its_channels(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_transformer(in_channels=48, out_channels=48).state_dict(), Kind.Q8_0)
    model = load_model(tmp_path / "model.gguf")
    assert model.geometry == WAN_22 and model.preset == PRESETS["longlive2"]


def test_bfloat16_tensors_of_a_gguf_file_are_plain(weights, checkpoint, tmp_path):
    write_gguf(tmp_path / "model.gguf", weights, Kind.BF16)
    model = load_model(tmp_path / "model.gguf", dtype="bfloat16")
    expected = load_model(checkpoint, dtype="bfloat16").transformer.state_dict()
    name = "blocks.1.attn1.to_q.weight"
    assert torch.equal(model.transformer.state_dict()[name], expected[name])


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16])
def test_a_folded_patch_embedding_is_unfolded(kind, told, weights, tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in original_names(weights).items():
        values = tensor.numpy()
        if values.ndim == 5:  # ggml has at most four dimensions
            if told:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = gguf.quants.quantize(values.reshape(-1, *values.shape[2:]), kind)
        writer.add_tensor(name, values)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    loaded = load_model(path, dtype="float32").transformer.state_dict()
    patch = weights["patch_embedding.weight"]
    expected = weights | {"patch_embedding.weight": patch.half().float() if kind == Kind.F16 else patch}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert inspect_checkpoint(path).config["dim"] == 256


def test_a_shape_that_does_not_go_with_its_values_is_refused(weights, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "wan")
    writer.add_array("comfy.gguf.orig_shape.proj_out.weight", [3, 5])
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor.reshape(-1, *tensor.shape[2:]).numpy() if tensor.ndim == 5 else tensor.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    refused(tmp_path / "model.gguf", "damaged or incomplete")


def test_a_list_that_the_file_does_not_hold_is_not_read_for_ever(weights, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, weights, Kind.Q8_0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x"
    path.write_bytes(header + struct.pack("<IIQ", 9, 0, 10**12))  # an array of 10^12 bytes
    refused(path, "lies outside the file")


def test_one_layer_at_a_time_is_unpacked(weights, tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", weights, Kind.Q8_0)
    model = load_model(tmp_path / "model.gguf")
    unpack, alive, most = gguf_utils.dequantize_gguf_tensor, weakref.WeakSet(), []

    def tracking(tensor):
        most.append(len(alive))
        alive.add(unpacked := unpack(tensor))
        return unpacked

    monkeypatch.setattr(gguf_utils, "dequantize_gguf_tensor", tracking)
    flow(model)
    assert len(most) > len(LAYERS) and max(most) == 0


def test_inspection_tells_how_a_gguf_file_is_packed(weights, tmp_path):
    write_gguf(tmp_path / "longlive-Q8_0.gguf", weights, Kind.Q8_0)
    info = inspect_checkpoint(tmp_path / "longlive-Q8_0.gguf", 32, 48)
    assert info.dtypes == ("Q8_0", "float32", "float16")
    assert info.layout == "original Wan names"
    assert info.config == {"layers": 2, "dim": 256, "heads": 2, "ffn": 512}
    assert info.parameters == sum(tensor.numel() for tensor in weights.values())
    assert info.preset == "longlive"


# LoRAs on such weights


@pytest.mark.parametrize("packed, bound", [("float8", 0.05), ("Q8_0", 0.015)])
def test_loras_run_beside_small_weights(packed, bound, weights, checkpoint, tmp_path):
    if packed == "float8":
        model = load_model(checkpoint, storage="float8")
    else:
        write_gguf(tmp_path / "model.gguf", weights, Kind.Q8_0)
        model = load_model(tmp_path / "model.gguf", dtype="float32")
    generator = torch.Generator().manual_seed(3)
    tensors = {"blocks.0.attn1.to_q.diff_b": torch.randn(256, generator=generator) / 4}
    for name in in_blocks(weights):
        out_features, in_features = weights[name].shape
        module = name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.randn(8, in_features, generator=generator) / 16
        tensors[f"{module}.lora_B.weight"] = torch.randn(out_features, 8, generator=generator) / 16
    loras = [(read_lora(tensors), 0.8)]
    full = load_model(checkpoint)
    change = -flow(full)
    with applied_loras(full, loras):
        change += flow(full)
    before, size = flow(model), nbytes(model)
    with applied_loras(model, loras):
        assert distance(flow(model) - before, change) < bound
        assert model.transformer.blocks[0].attn1.to_q.lora_A["lora_0"].weight.dtype == torch.float32
        assert video(model).isfinite().all()
    assert torch.equal(flow(model), before) and nbytes(model) == size


def test_a_lora_cannot_replace_packed_weights(weights, tmp_path):
    write_gguf(tmp_path / "model.gguf", weights, Kind.Q8_0)
    model = load_model(tmp_path / "model.gguf")
    half = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 256),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(256, 2),
    }
    for diff in (torch.ones(256, 256), torch.ones(256, 272)):
        lora = read_lora(half | {"blocks.0.attn1.to_k.diff": diff})
        with pytest.raises(CheckpointError), applied_loras(model, [(lora, 1.0)]):
            pass
    assert not hasattr(model.transformer, "peft_config")


# Messages


def test_the_choice_of_storage_is_checked(weights, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="one of model, float8, got 'float4'"):
        load_model(checkpoint, storage="float4")
    write_gguf(tmp_path / "model.gguf", weights, Kind.Q8_0)
    with pytest.raises(ValueError, match="GGUF file keeps its own packing"):
        load_model(tmp_path / "model.gguf", storage="float8")


def refused(path, match):
    for read in (load_model, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_gguf_file_is_recognised(kept, weights, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, weights, Kind.Q8_0)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path, "damaged or incomplete")


def test_what_is_no_gguf_file_of_a_wan_model_is_explained(weights, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"<!doctype html>")
    refused(path, "a web page")
    write_gguf(path, {name: tensor for name, tensor in weights.items() if "to_q" not in name}, Kind.Q8_0)
    refused(path, "8 missing: blocks.0.attn1.to_q.weight")
    write_gguf(path, with_prefix("double_blocks.0.", {"img_attn.weight": torch.zeros(64, 64)}), Kind.Q8_0)
    refused(path, "another family")
    write_gguf(path, weights, Kind.TQ1_0)
    refused(path, "packed as TQ1_0")


def test_a_missing_package_is_named(weights, tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", weights, Kind.Q8_0)
    monkeypatch.setattr(weights_module, "is_gguf_available", lambda: False)
    refused(tmp_path / "model.gguf", 'package gguf. Install it: pip install "gguf')
