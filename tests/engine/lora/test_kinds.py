"""Adapters of other kinds than LoRA change weights by their formulas, and as the libraries that train them merge them."""

import pytest
import torch
from builders import close, tiny_transformer
from lora_files import original
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.lora.reader import load_lora, read_lora
from rolling_kv.lora.stack import LoraStack, applied_loras

TARGETS = ["attn1.to_q", "attn2.to_v", "ffn.net.2", "time_proj"]
Q, FFN, PATCH = (
    "blocks.0.attn1.to_q",
    "blocks.1.ffn.net.0.proj",
    "patch_embedding",
)  # [128, 128], [96, 128], [128, 16, 1, 2, 2]


@pytest.fixture
def model():
    return CausalModel(tiny_transformer())


def values(*shapes, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) / 4 for shape in shapes]


def lokr(seed=3):
    """Of three layers: whole and split factors, and of the convolution in Tucker's form. Parts and difference of each."""
    w1, a, b = values((8, 4), (16, 2), (2, 32), seed=seed)
    c, d, e, f = values((8, 2), (2, 8), (12, 3), (3, 16), seed=seed + 1)
    g, t, h, i = values((4, 2), (3, 3, 1, 2, 2), (3, 32), (3, 8), seed=seed + 2)
    core = torch.einsum("ijtyx,io,jn->ontyx", t, h, i)
    return {
        Q: ({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}, torch.kron(w1, a @ b) / 2),
        FFN: ({"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": e, "lokr_w2_b": f}, torch.kron(c @ d, e @ f)),
        PATCH: (
            {"lokr_w1": g, "lokr_t2": t, "lokr_w2_a": h, "lokr_w2_b": i},
            torch.kron(g[..., None, None, None], core.contiguous()),
        ),
    }


def whole_lokr():
    w1, w2 = values((8, 4), (16, 32))
    return {Q: ({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(5.0)}, torch.kron(w1, w2))}  # LyCORIS: no scale


def loha():
    a, b, c, d = values((128, 4), (4, 128), (128, 4), (4, 128))
    e, f, g, h = values((128, 2), (2, 64), (128, 2), (2, 64))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {
        Q: (dict(zip(names, (a, b, c, d))) | {"alpha": torch.tensor(2.0)}, (a @ b) * (c @ d) / 2),
        PATCH: (dict(zip(names, (e, f, g, h))), ((e @ f) * (g @ h)).reshape(128, 16, 1, 2, 2)),
    }


def dora():
    """Lengths of the outputs, and as older files have them of the inputs."""
    weights = tiny_transformer().state_dict()
    (down, up, outputs, inputs), parts = values((4, 128), (128, 4), (128, 1), (1, 128)), {}
    for module, lengths, axis in ((Q, outputs.abs(), 1), ("blocks.0.attn1.to_k", inputs.abs(), 0)):
        weight = weights[f"{module}.weight"]
        merged = weight + up @ down * 0.5
        changed = merged / merged.norm(dim=axis, keepdim=True) * lengths
        matrices = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": lengths}
        parts[module] = {part: tensor.clone() for part, tensor in matrices.items()}, changed - weight
    return parts


def oft(alpha=0.0, rescale=True):
    weight = tiny_transformer().state_dict()[f"{Q}.weight"]
    (blocks, lengths), turned = values((8, 16, 16), (128, 1)), []
    skew = blocks - blocks.mT
    if alpha:
        skew = skew * min(1, alpha * 128 / skew.norm().item())
    for block, rows in zip(skew, weight.split(16)):
        turned.append(torch.linalg.solve(torch.eye(16) + block, torch.eye(16) - block) @ rows)  # R transposed
    parts = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)} | ({"rescale": lengths} if rescale else {})
    return {Q: (parts, torch.cat(turned) * (lengths if rescale else 1) - weight)}


def whole():
    diffs = {"blocks.0": ("diff_m", (1, 6, 128)), "blocks.1.attn1.norm_q": ("w_norm", (128,)), Q: ("diff_b", (128,))}
    return {module: ({part: (diff := values(shape)[0])}, diff) for module, (part, shape) in diffs.items()}


KINDS = {
    "LoKr": lokr,
    "LoKr of whole factors": whole_lokr,
    "LoHa": loha,
    "DoRA": dora,
    "OFT": oft,
    "OFT within bounds": lambda: oft(alpha=0.01, rescale=False),
    "whole differences": whole,
}
LAYOUTS = {
    "lycoris_": lambda module: "lycoris_" + module.replace(".", "_"),
    "lora_unet_": lambda module: "lora_unet_" + original(module).replace(".", "_"),
    "diffusion_model.": lambda module: "diffusion_model." + original(module),
    "base_model.model.": lambda module: "base_model.model." + original(module),
    "transformer.": lambda module: f"transformer.{module}",
}


def tensors_of(kind, rename=LAYOUTS["diffusion_model."]):
    return {f"{rename(module)}.{part}": tensor for module, (parts, _) in kind.items() for part, tensor in parts.items()}


def copied(model):
    return {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}


def with_added(weights, kind, strength):
    weights = dict(weights)
    for module, (parts, added) in kind.items():
        last = "scale_shift_table" if "diff_m" in parts else "bias" if "diff_b" in parts else "weight"
        weights[f"{module}.{last}"] = weights[f"{module}.{last}"] + strength * added
    return weights


def equal(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_changes_weights_by_its_formula_and_comes_off(kind, layout, model, tmp_path):
    parts, before = KINDS[kind](), copied(model)
    save_file(tensors_of(parts, LAYOUTS[layout]), tmp_path / "file.safetensors")
    lora = load_lora(tmp_path / "file.safetensors")
    assert lora.identity == read_lora(tensors_of(parts)).identity
    with applied_loras(model, [(lora, 0.7)]):
        assert close(model.transformer.state_dict(), with_added(before, parts, 0.7))
        assert not close(model.transformer.state_dict(), before)
    assert equal(model.transformer.state_dict(), before)


PEFT = {
    "LoKr": LoKrConfig(r=4, alpha=3, target_modules=TARGETS),
    "LoKr of whole factors": LoKrConfig(r=64, alpha=16, rank_pattern={"ffn.net.2": 128}, target_modules=TARGETS),
    "LoKr of split factors": LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=TARGETS),
    "LoHa": LoHaConfig(r=4, alpha=3, alpha_pattern={"attn2.to_v": 1}, target_modules=TARGETS),
    "DoRA": LoraConfig(r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=TARGETS),
    "LoRA with biases": LoraConfig(r=4, lora_alpha=3, lora_bias=True, target_modules=TARGETS),
    "LoRA of a convolution": LoraConfig(r=4, lora_alpha=3, target_modules=[*TARGETS, "patch_embedding"]),
}


@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_trains_is_merged_as_peft_merges_it(kind, model, tmp_path):
    theirs, before = get_peft_model(tiny_transformer(), PEFT[kind]), copied(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    theirs.save_pretrained(tmp_path)
    merged = theirs.merge_and_unload().state_dict()
    with applied_loras(model, [(load_lora(tmp_path / "adapter_model.safetensors"), 1.0)]):
        assert close(model.transformer.state_dict(), merged)
        assert not close(model.transformer.state_dict(), before)
    assert equal(model.transformer.state_dict(), before)


def test_several_on_one_parameter_add_up_and_the_first_value_comes_back(model):
    before = copied(model)
    kinds = [(lokr(), 0.5), (lokr(seed=8), -1.5), (dora(), 0.7), (loha(), 1.0), (whole(), 2.0), (whole(), -0.5)]
    down, up = values((4, 128), (128, 4))
    pair = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    wanted = with_added(before, {Q: ({}, up @ down)}, 0.3)
    for kind, strength in kinds:
        wanted = with_added(wanted, kind, strength)
    stack, loras = LoraStack(model), [(read_lora(tensors_of(kind)), strength) for kind, strength in kinds]
    for order in ([*loras, (read_lora(pair), 0.3)], [(read_lora(pair), 0.3), *reversed(loras)]):
        stack.set(order)
        assert all(torch.allclose(t, wanted[name], atol=1e-5) for name, t in model.transformer.state_dict().items())
        stack.clear()
        assert equal(model.transformer.state_dict(), before)


@pytest.mark.parametrize("part", ["lokr_w1", "lokr_w2_a", "alpha", "dora_scale"])
def test_identity_covers_values_of_every_tensor(part):
    def tensors():
        return {name: tensor.clone() for name, tensor in tensors_of(lokr() | {FFN: dora()[Q]}).items()}

    identity = read_lora(tensors()).identity
    assert read_lora(tensors()).identity == identity
    key = next(name for name in tensors() if name.endswith(part))
    for index in range(0, tensors()[key].numel(), 5):
        changed = tensors()
        changed[key].view(-1)[index] += 0.5
        assert read_lora(changed).identity != identity


def test_identity_covers_kind_and_place():
    split = {name.replace("lora_down", "lora_A"): tensor for name, tensor in tensors_of(dora()).items()}
    plain = {name: tensor for name, tensor in split.items() if not name.endswith("dora_scale")}
    moved = {name.replace("self_attn.q", "self_attn.v"): tensor for name, tensor in plain.items()}
    assert len({read_lora(tensors).identity for tensors in (split, plain, moved)}) == 3


def test_packed_weights_refuse_a_change_of_the_whole(model):
    model.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = copied(model)
    with pytest.raises(CheckpointError, match=r"the_file changes 1 weights as a whole \(blocks.0.attn1.to_q.weight\)"):
        LoraStack(model).set([(read_lora(tensors_of(whole_lokr()), "the_file"), 1.0)])
    assert equal({n: t.float() for n, t in before.items()}, {n: t.float() for n, t in copied(model).items()})
