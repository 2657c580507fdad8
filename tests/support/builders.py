"""Small models with random weights, and the file layouts that people have them in."""

import io
import json
import re
import struct

import sentencepiece
import tokenizers
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

SIZE = dict(
    num_attention_heads=1, attention_head_dim=128, num_layers=2, ffn_dim=96, text_dim=32, freq_dim=32,
    rope_max_seq_len=64,
)  # fmt: skip

_TO_ORIGINAL = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("^scale_shift_table", "head.modulation"),
    ("scale_shift_table", "modulation"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"\.norm2\.", ".norm3."),
)


def tiny_transformer(**size) -> WanTransformer3DModel:
    """Every weight is random, so that tensors which change places are noticed."""
    generator = torch.Generator().manual_seed(0)
    model = WanTransformer3DModel(**(SIZE | size)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def original_names(weights: dict) -> dict:
    """A diffusers state dict under the names of the original Wan release."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in _TO_ORIGINAL:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def with_prefix(prefix: str, weights: dict) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def scaled_float8(weights: dict) -> tuple[dict, dict]:
    """Linear weights as scaled float8 with ComfyUI's tensor names, and what they stand for in float32."""
    stored, meant = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in weights.items():
        stored[name] = meant[name] = tensor
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            stored[name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
            meant[name] = stored[name].float() * scale
    return stored, meant


def shuffled(weights):
    return {name: tensor.flip(-1).contiguous() for name, tensor in weights.items()}


FSDP = "model._fsdp_wrapped_module."
CHECKPOINTS = {  # what files of these names hold, around diffusers' weights
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


def write_weights(path, content):
    """A weight file of the kind that its name says; returns the path."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def write_sparse_safetensors(path, shapes: dict) -> None:
    """A bfloat16 file of any size that takes no disk space: a true header and a hole where the values would be."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def sentencepiece_model() -> bytes:
    """A small SentencePiece model with the special tokens where UMT5 has them: pad 0, EOS 1, unknown 2."""
    words = "a red blue circle square moving left right up slowly across the stormy sea at dawn cats & dogs".split()
    lines = (" ".join(words[i % len(words)] for i in range(k, k * k, k + 1)) for k in range(3, 60))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
    )  # fmt: skip
    return model.getvalue()


def transformers_tokenizer(model: bytes) -> PreTrainedTokenizerFast:
    """The same vocabulary as transformers has it in a diffusers pipeline, built up as its converter for T5 does."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    splitters = [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splitters)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_umt5() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    generator = torch.Generator().manual_seed(0)
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def changed(weights, pairs, scale=1.0):
    """The weights with `scale * up @ down` added."""
    added = {f"{module}.weight": up @ down * scale for module, (down, up) in pairs.items()}
    return {name: tensor + added[name] if name in added else tensor for name, tensor in weights.items()}


def close(weights, expected):
    return weights.keys() == expected.keys() and all(
        torch.allclose(weights[name], expected[name], atol=1e-6) for name in weights
    )
