"""LoRA files in every layout change the weights as they should, and come off without a trace."""

import json

import pytest
import torch
from builders import changed, close, original_names, tiny_transformer, write_weights
from diffusers.loaders import lora_conversion_utils
from lora_files import RANK, fsdp, kohya, matrices, original, peft, underscored
from safetensors.torch import save_file

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.lora.reader import load_lora, read_lora
from rolling_kv.lora.stack import LoraStack, applied_loras, fit_lora
from rolling_kv.sampling.session import RollingSession

INPUTS = dict(
    hidden_states=torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    timestep=torch.tensor([500.0]),
    encoder_hidden_states=torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2)),
)
each_way = pytest.mark.parametrize("fuse", [True, False], ids=["fused", "runtime"])


@pytest.fixture
def model():
    return CausalModel(tiny_transformer())


def old_names(pairs, prefix):
    halves = {"lora_A": "lora.down", "lora_B": "lora.up"}
    return {name.replace(n := name.split(".")[-2], halves[n]): tensor for name, tensor in peft(pairs, prefix).items()}


FILES = {  # what the file holds, and the scale (alpha / rank) that it asks for
    "longlive.pt": lambda p: (
        {
            "generator_lora": peft(p, "base_model.model.", fsdp),
            "critic_lora": peft(matrices(seed=9), "base_model.model.", original),
            "step": 100,
        },
        1.0,
    ),
    "peft_named.pt": lambda p: (peft(p, "base_model.model.", original, ".default"), 1.0),
    "original.safetensors": lambda p: (peft(p, "diffusion_model.", original), 1.0),
    "original_bare.safetensors": lambda p: (peft(p, "", original), 1.0),
    "original_alpha.safetensors": lambda p: (kohya(p, "diffusion_model.", original, 1.0), 0.25),
    "kohya.safetensors": lambda p: (kohya(p, "lora_unet_", underscored, 2.0), 0.5),
    "kohya_diffusers.safetensors": lambda p: (
        kohya(p, "lora_unet_", lambda module: module.replace(".", "_"), 8.0),
        2.0,
    ),
    "diffusers.safetensors": lambda p: (peft(p), 1.0),
    "diffusers_bare.pt": lambda p: (peft(p, ""), 1.0),
    "diffsynth.safetensors": lambda p: (peft(p, "", original, ".default"), 1.0),
    "diffsynth_pipe.safetensors": lambda p: (peft(p, "pipe.dit.", original, ".default"), 1.0),
    "unet.safetensors": lambda p: (peft(p, "unet.", original), 1.0),
    "diffusers_old.safetensors": lambda p: (old_names(p, "transformer."), 1.0),
    "diffusers_old_peft.safetensors": lambda p: (old_names(p, "transformer.base_model.model."), 1.0),
    "onetrainer.safetensors": lambda p: (kohya(p, "lora_transformer_", underscored, 2.0), 0.5),
    "simpletuner.safetensors": lambda p: (
        kohya(p, "lycoris_", lambda module: module.replace(".", "_"), 2.0),
        0.5,
    ),
    "fun.safetensors": lambda p: (kohya(p, "lora_unet__", underscored, 2.0), 0.5),
    "as_convolutions.safetensors": lambda p: (
        {name: tensor[..., None, None] for name, tensor in peft(p, "diffusion_model.", original).items()},
        1.0,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_layout_changes_the_same_weights(name, model, tmp_path):
    content, scale = FILES[name](matrices())
    lora = load_lora(write_weights(tmp_path / name, content))
    expected = changed(model.transformer.state_dict(), matrices(), scale)
    with applied_loras(model, [(lora, 1.0)]):
        assert close(model.transformer.state_dict(), expected)
    same = kohya(matrices(), "lora_unet_", underscored, RANK * scale)
    assert lora.identity == read_lora(same).identity


def test_the_lora_of_longlive_2_changes_every_layer_of_the_blocks(tmp_path):
    """Rank and alpha are equal; the names are those of the original code, as in LongLive's."""
    size = dict(in_channels=48, out_channels=48)
    model, pairs = CausalModel(tiny_transformer(**size)), matrices(**size)
    assert len(pairs) == 10 * len(model.transformer.blocks)
    expected = changed(model.transformer.state_dict(), pairs)
    path = write_weights(tmp_path / "lora.pt", {"generator_lora": peft(pairs, "base_model.model.", fsdp)})
    with applied_loras(model, [(load_lora(path), 1.0)]):
        assert close(model.transformer.state_dict(), expected)


@pytest.mark.parametrize(
    "rename", [underscored, lambda module: module.replace(".", "_")], ids=["original", "diffusers"]
)
def test_underscored_names_of_every_layer_are_understood(rename, model):
    pairs = matrices(only="")
    before = dict(model.transformer.state_dict())
    with applied_loras(model, [(read_lora(kohya(pairs, "lora_unet_", rename, 2.0)), 1.0)]):
        assert close(model.transformer.state_dict(), changed(before, pairs, 0.5))


@pytest.mark.parametrize("settings, scale", [({"lora_alpha": 2}, 0.5), ({"lora_alpha": 2, "use_rslora": True}, 1.0),
                                             ({"lora_alpha": 2, "alpha_pattern": {"ffn.0": 8}}, None)])  # fmt: skip
def test_the_alpha_of_an_adapter_config_is_used(settings, scale, tmp_path):
    write_weights(tmp_path / "adapter_model.safetensors", peft(matrices(), "base_model.model.", original))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    metadata = tmp_path / "other.safetensors"
    packed = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in settings.items()})}
    save_file(peft(matrices(), "diffusion_model.", original), metadata, packed)
    for lora in (load_lora(tmp_path / "adapter_model.safetensors"), load_lora(metadata)):
        scales = {name: layer.alpha / RANK for name, layer in lora.layers.items()}
        assert scales["blocks.0.attn1.to_q"] == (scale or 0.5)
        assert scales["blocks.1.ffn.net.0.proj"] == (scale or 2.0)


@pytest.mark.parametrize("metadata", ["{", "[1]", "3"])
def test_metadata_that_is_no_object_is_explained(metadata, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(peft(matrices(), "diffusion_model.", original), path, {"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: its metadata .* is no JSON object"):
        load_lora(path)


def test_names_and_scales_are_those_of_the_converters_of_diffusers():
    pairs = matrices()
    original_file, kohya_file = peft(pairs, "diffusion_model.", original), kohya(pairs, "lora_unet_", underscored, 2.0)
    theirs = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(dict(original_file))
    assert {f"transformer.{module}.lora_A.weight" for module in read_lora(original_file).layers} < theirs.keys()
    theirs = lora_conversion_utils._convert_musubi_wan_lora_to_diffusers(dict(kohya_file))
    for module, (down, up, alpha) in read_lora(kohya_file).layers.items():
        theirs_down, theirs_up = (theirs[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        assert torch.allclose(theirs_up @ theirs_down, up @ down * alpha / RANK)


def test_layers_outside_the_blocks_ranks_and_alphas_may_differ(model):
    first = matrices(rank=8, only="blocks.0.attn1")
    rest = matrices(rank=2, only="time_proj") | matrices(rank=2, only="proj_out") | matrices(rank=2, only="text_emb")
    tensors = kohya(first, "diffusion_model.", original, 4.0) | peft(rest, "diffusion_model.", original)
    lora = read_lora(tensors)
    expected = changed(changed(model.transformer.state_dict(), first, 0.5), rest)
    with applied_loras(model, [(lora, 1.0)]):
        assert close(model.transformer.state_dict(), expected)


def outputs(model):
    with torch.inference_mode():
        dtype = model.dtype
        inputs = {name: value if name == "timestep" else value.to(dtype) for name, value in INPUTS.items()}
        return model.transformer(**inputs, return_dict=False)[0]


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def anatomy(model):
    """Everything that tells the module from a changed one."""
    modules = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    weights = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}
    return modules, weights, list(model.state_dict()), model.identity


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taking_a_lora_off_leaves_no_trace(fuse, dtype):
    model = CausalModel(tiny_transformer().to(dtype))
    before, anatomy_before = outputs(model), anatomy(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with applied_loras(
        model, [(read_lora(peft(matrices())), 1.0), (read_lora(peft(matrices(seed=5))), -0.3)], fuse=fuse
    ):
        assert distance(outputs(model), before) > 0.02
        assert model.identity != anatomy_before[3]
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert anatomy(model) == anatomy_before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model), before)


def test_a_model_whose_weights_should_not_be_kept_twice_has_its_loras_beside_it(model, monkeypatch):
    lora, before = read_lora(peft(matrices())), outputs(model)
    with applied_loras(model, [(lora, 1.0)]):
        fused = outputs(model)
    monkeypatch.setattr("rolling_kv.lora.stack._MOST_KEPT", 1)
    with applied_loras(model, [(lora, 1.0)]) as stack:
        assert not stack._originals and "lora_A" in str(model.transformer.blocks[0].attn1.to_q)
        torch.testing.assert_close(outputs(model), fused, atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs(model), before)


@each_way
def test_an_interrupt_while_applying_leaves_the_bare_model(fuse, model, monkeypatch):
    before, anatomy_before = outputs(model), anatomy(model)
    stack = LoraStack(model, fuse)

    def interrupted(*_):
        raise KeyboardInterrupt

    lora = read_lora(peft(matrices()) | {"transformer.blocks.0.attn1.to_q.diff_b": torch.ones(128)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model.transformer), "set_adapters", interrupted)
        stack.set([(lora, 1.0)])
    assert anatomy(model) == anatomy_before
    assert torch.equal(outputs(model), before)
    assert stack.set([(lora, 1.0)])


@each_way
def test_strengths_add_up(fuse, model):
    first, second = matrices(rank=2, seed=5), matrices(rank=6, seed=6)
    other = CausalModel(tiny_transformer())
    weights = changed(changed(other.transformer.state_dict(), first, 0.5), second, -1.5)
    other.transformer.load_state_dict(weights)
    loras = [(read_lora(peft(first)), 0.5), (read_lora(peft(second)), -1.5), (read_lora(peft(matrices(seed=7))), 0.0)]
    with applied_loras(model, loras, fuse=fuse):
        assert distance(outputs(model), outputs(other)) < 1e-6


def test_the_same_stack_is_not_applied_again(model):
    stack = LoraStack(model)
    bare = model.identity
    first, second = read_lora(peft(matrices())), read_lora(peft(matrices(seed=5)))
    assert stack.set([]) is False
    assert stack.set([(first, 1.0)]) is True
    assert stack.holds([(first, 1)]) and not stack.holds([(first, 0.5)]) and not stack.holds([])
    one = model.identity
    assert stack.set([(read_lora(peft(matrices())), 1)]) is False
    assert stack.set([(first, 1.0), (second, 0.0)]) is False
    assert stack.set([(first, 0.5)]) is True and model.identity not in (bare, one)
    assert stack.set([(first, 1.0), (second, 1.0)]) is True
    assert stack.set([(first, 1.0)]) is True and model.identity == one
    assert stack.set([]) is True and model.identity == bare


def test_weights_of_half_precision_files_are_used_as_they_are(model):
    pairs = {name: tuple(half.bfloat16() for half in pair) for name, pair in matrices().items()}
    expected = changed(model.transformer.state_dict(), {n: (d.float(), u.float()) for n, (d, u) in pairs.items()})
    with applied_loras(model, [(read_lora(peft(pairs)), 1.0)]):
        assert close(model.transformer.state_dict(), expected)


@each_way
def test_whole_differences_are_added(fuse, model):
    weights = model.transformer.state_dict()
    differences = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", torch.randn(128)),
        "diffusion_model.blocks.1.norm3.diff": ("blocks.1.norm2.weight", torch.randn(128)),
        "diffusion_model.blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", torch.randn(128)),
        "diffusion_model.blocks.1.modulation.diff": ("blocks.1.scale_shift_table", torch.randn(1, 6, 128)),
        "diffusion_model.head.head.diff": ("proj_out.weight", torch.randn(64, 128)),
    }
    tensors = {key: diff for key, (_, diff) in differences.items()}
    tensors["diffusion_model.blocks.0.norm1.diff"] = torch.zeros(128)  # has no place, and changes nothing
    lora = read_lora(peft(matrices(), "diffusion_model.", original) | tensors)
    other = CausalModel(tiny_transformer())
    weights = changed(other.transformer.state_dict(), matrices(), 0.5)
    for name, diff in differences.values():
        weights[name] = weights[name] + 0.5 * diff
    other.transformer.load_state_dict(weights)
    before = outputs(model)
    with applied_loras(model, [(lora, 0.5)], fuse=fuse):
        assert distance(outputs(model), outputs(other)) < 1e-6
    assert torch.equal(outputs(model), before)


def test_parts_for_an_image_encoder_are_left_out(model):
    pairs = matrices()
    extra = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(4, 128),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": torch.ones(128, 4),
        "diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(128),
        "diffusion_model.img_emb.proj.1.lora_A.weight": torch.ones(4, 9),
        "diffusion_model.img_emb.proj.1.lora_B.weight": torch.ones(9, 4),
    }
    lora = read_lora(peft(pairs, "diffusion_model.", original) | extra)
    assert lora.identity == read_lora(peft(pairs)).identity
    fit_lora(lora, model)


# With the rolling cache

SAMPLING = SamplingConfig(chunk=1, denoising_steps=(1000, 500))
PROMPT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(4))


def video(model):
    with RollingSession(model, PROMPT, height=32, width=48, sampling=SAMPLING, cache=CacheConfig(3, sink=1)) as session:
        for _ in session.generate(4, seed=1):
            pass
    return session.state


@each_way
def test_a_video_with_a_lora_is_that_of_the_merged_model(fuse, model):
    merged = CausalModel(tiny_transformer())
    merged.transformer.load_state_dict(changed(merged.transformer.state_dict(), matrices(), 0.7))
    bare = video(model)
    with applied_loras(model, [(read_lora(peft(matrices())), 0.7)], fuse=fuse):
        state = video(model)
    assert distance(state.latents(), video(merged).latents()) < 1e-5
    assert distance(state.latents(), bare.latents()) > 0.01
    assert state.model != bare.model
    assert torch.equal(video(model).latents(), bare.latents())


# Messages


def refused(tensors, match, tmp_path, name="lora.safetensors"):
    path = write_weights(tmp_path / name, tensors)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_lora(path)
    assert str(path) in str(caught.value)


def test_what_is_no_lora_is_named(tmp_path):
    refused(original_names(tiny_transformer().state_dict()), "a Wan video model, not a LoRA", tmp_path)
    refused({"decoder.conv1.weight": torch.zeros(2, 2)}, "a VAE, not a LoRA", tmp_path)
    name = "diffusion_model.blocks.0.self_attn.q"
    refused({f"{name}.oft_R.weight": torch.zeros(2, 2)}, r"another kind than LoRA .*oft_R.weight \[2, 2\]", tmp_path)
    butterflies = {f"{name}.oft_blocks": torch.zeros(2, 8, 16, 16)}
    refused(kohya(matrices(), "lora_unet_", underscored, 1.0) | butterflies, "oft_blocks", tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_lora(tmp_path / "absent.safetensors")


def test_an_incomplete_lora_is_refused(tmp_path):
    tensors = peft(matrices(), "diffusion_model.", original)
    half = "diffusion_model.blocks.0.self_attn.q.lora_B.weight"
    refused({name: t for name, t in tensors.items() if name != half}, "1 layers .*blocks.0.self_attn.q", tmp_path)
    refused(tensors | {half: torch.zeros(128, 3)}, "blocks.0.self_attn.q have the ranks 4 and 3", tmp_path)
    refused(tensors | {"lora_te_text.strange": torch.zeros(2)}, r"1 tensors .*lora_te_text.strange \[2\]", tmp_path)
    path = write_weights(tmp_path / "lora.safetensors", tensors)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_lora(path)


def test_a_lora_of_another_size_is_refused_with_both_sizes(model):
    stack = LoraStack(model)
    fitting = read_lora(peft(matrices()))
    stack.set([(fitting, 1.0)])
    applied, now = stack.applied, outputs(model)
    wide = read_lora(peft(matrices(num_attention_heads=2)), "big_lora")
    with pytest.raises(CheckpointError, match=r"big_lora .*blocks.0.attn1.to_q .*width 256, .*width 128.* this size"):
        stack.set([(fitting, 1.0), (wide, 1.0)])
    deep = read_lora(peft({name: pair for name, pair in matrices(num_layers=3).items() if ".2." in name}), "deep_lora")
    with pytest.raises(CheckpointError, match=r"deep_lora .*10 of its 10 parts .*blocks.2.attn1.to_q, .* and others"):
        stack.set([(deep, 1.0)])
    assert stack.applied == applied and torch.equal(outputs(model), now)


def test_the_published_sizes_are_named(model):
    pair = {"diffusion_model.blocks.0.self_attn.q": (torch.zeros(4, 5120), torch.zeros(5120, 4))}
    with pytest.raises(CheckpointError, match=r"width 5120 \(Wan 14B\), this model is \[128, 128\], width 128"):
        fit_lora(read_lora(peft(pair, "")), model)
