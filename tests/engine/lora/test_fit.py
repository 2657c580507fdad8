"""What of a LoRA has a place in a model is applied, what has none is named, and damaged files get one clear sentence."""

import json
import logging
import re

import pytest
import torch
from builders import changed, close, tiny_transformer, write_weights
from lora_files import kohya, matrices, original, peft
from safetensors.torch import save_file

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.checkpoints.names import LORA, kind_of
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.lora.reader import load_lora, read_lora
from rolling_kv.lora.stack import LoraStack, fit_lora

NAME = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture
def model():
    return CausalModel(tiny_transformer())


def file(extra=None):
    return peft(matrices(), "diffusion_model.", original) | (extra or {})


IMAGE_TO_VIDEO = {
    "diffusion_model.patch_embedding.lora_A.weight": torch.ones(4, 36, 1, 2, 2),
    "diffusion_model.patch_embedding.lora_B.weight": torch.ones(128, 4, 1, 1, 1),
    "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(4, 128),
    "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": torch.ones(128, 4),
    "diffusion_model.img_emb.proj.1.diff": torch.ones(9, 4),
}
LEFT_OUT = {  # what is added to a file that fits, and what is told of it
    "image-to-video": (IMAGE_TO_VIDEO, [r"patch_embedding, which is .*36 channels \(image-to-video\).*16 channels", "add_k_proj", "image_embedder"]),
    "more blocks": (
        peft({n: p for n, p in matrices(num_layers=3).items() if "blocks.2.attn1" in n}, "diffusion_model.", original),
        ["blocks.2.attn1.to_q", "blocks.2.attn1.to_k", "blocks.2.attn1.to_v", "blocks.2.attn1.to_out.0"],
    ),
    "text encoder": (
        {
            "lora_te1_text_model_layers_0_q.lora_down.weight": torch.ones(4, 64),
            "lora_te1_text_model_layers_0_q.lora_up.weight": torch.ones(64, 4),
        },
        ["lora_te1_text_model_layers_0_q"],
    ),
    "another latent": ({"diffusion_model.patch_embedding.diff": torch.ones(128, 36, 1, 2, 2)}, ["patch_embedding.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_parts_without_a_place_are_left_out_and_named(case, model, caplog):
    extra, told = LEFT_OUT[case]
    before = dict(model.transformer.state_dict())
    lora = read_lora(file(extra), "style")
    with caplog.at_level(logging.WARNING, "rolling_kv"):
        fitted = fit_lora(lora, model)
    assert len(fitted.left_out) == len(told)
    for part, words in zip(fitted.left_out, told):
        assert re.search(words, part)
    message = f"style was made for another model: {len(told)} of its {20 + len(told)} parts have no place in this one"
    assert message in caplog.text and fitted.left_out[0] in caplog.text
    assert fit_lora(fitted, model) is fitted and len(caplog.records) == 1  # told once
    stack = LoraStack(model)
    assert stack.set([(lora, 1.0)])
    assert close(model.transformer.state_dict(), changed(before, matrices()))
    assert stack.set([(fitted, 1.0)]) is False
    stack.clear()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.transformer.state_dict().items())


def test_a_lora_of_which_nothing_fits_is_refused(model):
    with pytest.raises(CheckpointError, match=r"style .* another model: 3 of its 3 parts have no place .*36 channels"):
        fit_lora(read_lora(IMAGE_TO_VIDEO, "style"), model)


def test_another_width_is_refused_though_other_parts_would_be_left_out(model):
    wide = peft(matrices(num_attention_heads=2), "diffusion_model.", original) | IMAGE_TO_VIDEO
    with pytest.raises(CheckpointError, match="width 256, this model is .*width 128. Choose the LoRA for this size"):
        fit_lora(read_lora(wide), model)
    deep = {name: pair for name, pair in matrices(ffn_dim=64).items() if "net.2" in name}
    with pytest.raises(CheckpointError, match="blocks.0.ffn.net.2 .*width 64, this model is .*width 96"):
        fit_lora(read_lora(peft(deep) | peft(matrices(only="attn"))), model)
    patch = {"diffusion_model.patch_embedding.diff": torch.ones(256, 16, 1, 2, 2)}
    with pytest.raises(CheckpointError, match=r"\[256, 16, 1, 2, 2\], width 256, .*, width 128, 16 channels"):
        fit_lora(read_lora(patch), model)


@pytest.mark.parametrize(
    "part",
    ["diff_m", "diff", "diff_b", "lokr_w1", "hada_w1_a", "oft_blocks", "dora_scale", "lora.down.weight", "lora_A"],
)
def test_files_of_every_kind_are_known_as_loras(part):
    assert kind_of({f"blocks.0.self_attn.q.{part}": torch.zeros(1)}) == LORA


SENTENCES = {  # one tensor that is wrong, and the sentence
    "rank 0": ({f"{NAME}.lora_A.weight": torch.zeros(0, 128)}, rf"{NAME}.lora_A.weight is empty \(\[0, 128\]\): its rank"),
    "a vector": ({f"{NAME}.lora_A.weight": torch.zeros(4)}, r"blocks.0.self_attn.q do not go together: .*\[4\]"),
    "no dimensions": ({f"{NAME}.lora_B.weight": torch.tensor(1.0)}, r"blocks.0.self_attn.q do not go together"),
    "a large up": ({f"{NAME}.lora_B.weight": torch.zeros(128, 4, 3)}, r"blocks.0.self_attn.q do not go together"),
    "alphas": ({f"{NAME}.alpha": torch.ones(2)}, rf"{NAME}.alpha should be one number; it has 2 values"),
    "alpha nan": ({f"{NAME}.alpha": torch.tensor(torch.nan)}, rf"{NAME}.alpha holds values that are not finite"),
    "nan": ({f"{NAME}.lora_A.weight": torch.full((4, 128), torch.nan)}, rf"{NAME}.lora_A.weight holds .*not finite"),
    "infinity": ({f"{NAME}.diff_b": torch.tensor([1.0, -torch.inf])}, rf"{NAME}.diff_b holds .*not finite"),
    "float8": ({f"{NAME}.diff_b": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)}, rf"{NAME}.diff_b holds .*not fin"),
    "whole numbers": ({f"{NAME}.lora_A.weight": torch.ones(4, 128, dtype=torch.int8)}, rf"{NAME}.lora_A.weight holds int8"),
    "half a LoKr": ({"blocks.0.ffn.1.lokr_w1": torch.ones(2, 2)}, r"incomplete: blocks.0.ffn.1 has lokr_w1 \[2, 2\], but no"),
    "half a LoHa": ({"blocks.0.ffn.1.hada_w1_b": torch.ones(2, 2)}, r"incomplete: blocks.0.ffn.1 has .* no hada_w1_a"),
    "a rescale alone": ({"blocks.0.ffn.1.rescale": torch.ones(2, 2)}, r"incomplete: blocks.0.ffn.1 has .* no oft_blocks"),
    "lengths": ({f"{NAME}.dora_scale": torch.ones(3)}, r"blocks.0.self_attn.q do not go together: .*magnitude \[3\]"),
    "lengths alone": ({"blocks.0.ffn.1.dora_scale": torch.ones(3)}, r"blocks.0.ffn.1 are not those of one adapter"),
    "blocks": ({"blocks.0.ffn.1.oft_blocks": torch.ones(2, 2, 3)}, r"blocks.0.ffn.1 do not go together"),
    "two kinds": ({f"{NAME}.lokr_w1": torch.ones(2, 2)}, r"blocks.0.self_attn.q are not those of one adapter: .*lokr_w1"),
    "two adapters": ({f"{NAME}.lora_A.second.weight": torch.ones(4, 128)}, "several adapters: .*self_attn.q. Save one"),
    "two names": ({"blocks.0.modulation.diff": torch.ones(1), "blocks.0.diff_m": torch.ones(1)}, "blocks.0.modulation in two"),
    "unknown": ({f"{NAME}.scalar": torch.ones(1)}, rf"1 tensors .* not understood: {NAME}.scalar"),
    "a long name": ({"x" * 400 + ".diff": torch.ones(1)}, "1 tensors .* not understood"),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_what_is_wrong_with_a_file_is_one_sentence_with_the_layer(case, tmp_path):
    wrong, sentence = SENTENCES[case]
    with pytest.raises(CheckpointError, match=sentence):
        load_lora(write_weights(tmp_path / "lora.pt", file(wrong)))


def with_settings(tmp_path, **settings):
    path = tmp_path / "other.safetensors"
    save_file(file(), path, {"lora_adapter_metadata": json.dumps({f"transformer.{n}": v for n, v in settings.items()})})
    return load_lora(path)


@pytest.mark.parametrize(
    "pattern", ["blocks.0.self_attn.q", "self_attn.q", "q", "^blocks.0.self_attn.q", r"self_attn\.q$"]
)
def test_names_in_an_alpha_pattern_are_those_of_layers(pattern, tmp_path):
    lora = with_settings(tmp_path, lora_alpha=2, alpha_pattern={"elf_attn.q": 5, "^q": 5, "v": 5, pattern: 8})
    assert lora.layers["blocks.0.attn1.to_q"].alpha == 8 and lora.layers["blocks.0.attn1.to_k"].alpha == 2


def test_the_first_name_in_an_alpha_pattern_counts(tmp_path):
    lora = with_settings(tmp_path, alpha_pattern={"q": 1, "blocks.0.self_attn.q": 2, "blocks.0.ffn.0": 3, "ffn.0": 4})
    alphas = {name: layer.alpha for name, layer in lora.layers.items()}
    assert alphas["blocks.0.attn1.to_q"] == 1 and alphas["blocks.1.ffn.net.0.proj"] == 4
    assert alphas["blocks.0.ffn.net.0.proj"] == 3 and alphas["blocks.0.attn1.to_k"] == 4


WRONG_SETTINGS = {
    "an endless expression": (
        {"alpha_pattern": {"((.*)*)*x": 1}},
        r"the expression '\(\(\.\*\)\*\)\*x'. Only plain names",
    ),
    "no expression": ({"alpha_pattern": {"(": 1}}, r"the expression '\('"),
    "a list": ({"alpha_pattern": ["q"]}, r"alpha_pattern .* should be a JSON object, not \['q'\]"),
    "a text": ({"alpha_pattern": {"q": "8"}}, "q in the adapter's config should be a number, not '8'"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha .* should be a number, not 'much'"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha .* should be a number, not nan"),
    "a large alpha": ({"lora_alpha": 10**400}, "lora_alpha .* should be a number, not 1000"),
    "true": ({"lora_alpha": True}, "lora_alpha .* should be a number, not True"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_settings_that_cannot_be_used_are_one_sentence(case, tmp_path):
    settings, sentence = WRONG_SETTINGS[case]
    with pytest.raises(CheckpointError, match=sentence):
        with_settings(tmp_path, **settings)


def test_every_value_tells_loras_apart(model):
    """Two files that differ in one value anywhere are two LoRAs, and each is applied."""
    first = file()
    second = {name: tensor.clone() for name, tensor in first.items()}
    key = f"{NAME}.lora_B.weight"
    second[key].view(-1)[37] += 1
    stack = LoraStack(model)
    assert stack.set([(read_lora(first), 1.0)])
    weights, one = dict(model.transformer.state_dict()), model.identity
    assert stack.set([(read_lora(second), 1.0)]) and model.identity != one
    assert not close(model.transformer.state_dict(), weights)


def test_all_that_changes_a_result_is_in_the_identity_of_the_model(model):
    """Values, alpha, strength, order and the way of applying: any other of them is another model."""

    def identity(loras, fuse=None):
        other = CausalModel(tiny_transformer())
        LoraStack(other, fuse).set(loras)
        return other.identity

    a, b = read_lora(peft(matrices())), read_lora(peft(matrices(seed=5)))
    stronger = read_lora(kohya(matrices(), "diffusion_model.", original, 8.0))
    stacks = [[(a, 1.0)], [(b, 1.0)], [(stronger, 1.0)], [(a, 0.5)], [(a, 1.0), (b, 1.0)], [(b, 1.0), (a, 1.0)]]
    found = [model.identity, *map(identity, stacks), identity(stacks[0], False), identity(stacks[0], True)]
    assert len(set(found)) == len(found)
    assert identity([(read_lora(peft(matrices())), 1.0)]) == identity(stacks[0])
