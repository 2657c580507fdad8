"""A complete model of a few MB in the layout of the real ones, so that everything can run anywhere.

`make_tiny` fills it with random weights: it makes moving textures, at any size, on any machine, in seconds.
`save_model` writes any such model; trained weights go through it too, and lie in `BUNDLED`.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import sentencepiece
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from .atomic import replacing
from .config import CacheConfig
from .geometry import TEXT_LENGTH, WAN_21, Geometry
from .presets import PRESETS, ModelPreset
from .vae.latents import STATISTICS
from .vae.loading import ARCHITECTURES

TINY_TRANSFORMER: dict[str, Any] = dict(
    num_attention_heads=4, attention_head_dim=32, num_layers=4, ffn_dim=256, text_dim=64, freq_dim=64,
)  # fmt: skip
TINY_VAE: dict[str, Any] = dict(base_dim=8)
TINY_TEXT: dict[str, Any] = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
_LONGLIVE_2 = PRESETS["longlive2"]
TINY_PRESETS = {
    16: ModelPreset("tiny", cache=CacheConfig(window=9)),
    48: replace(
        _LONGLIVE_2,
        name="tiny longlive2",
        sampling=replace(_LONGLIVE_2.sampling, chunk=2, num_inference_steps=2),
        cache=replace(_LONGLIVE_2.cache, window=8, sink=2),
    ),
}
"""Settings of the tiny models by their latent channels: those of a family, with little to compute."""
VOCABULARY = 400
Model = TypeVar("Model", bound=nn.Module)

_RANDOM_MARK = "random_weights_seed"
"""Entry of rolling_kv.json that tells a folder of `make_tiny`, which it may replace, from any other model."""
_PAD, _EOS, _UNKNOWN = "<pad>", "</s>", "<unk>"


def make_tiny(folder: str | Path, seed: int = 0, geometry: Geometry = WAN_21) -> Path:
    """Write the tiny model with random weights into `folder` and return the path; the same seed gives the same files.

    geometry: of the latents that it makes.

    Replaces an empty folder or an earlier model of its own. Raises ValueError for a folder with anything else in it.
    """
    folder = Path(folder).absolute()
    _check_replaceable(folder)
    tokenizer = train_tokenizer(corpus())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    channels = geometry.channels
    mean, std = map(list, STATISTICS[channels])
    size: dict[str, Any] = TINY_TRANSFORMER | dict(in_channels=channels, out_channels=channels)
    transformer = _randomize(WanTransformer3DModel(**size), seed)
    vae = AutoencoderKLWan(**TINY_VAE, **ARCHITECTURES[channels], latents_mean=mean, latents_std=std)
    vae = _randomize(vae, seed)
    text_encoder = _randomize(UMT5EncoderModel(UMT5Config(vocab_size=pieces, **TINY_TEXT)), seed)
    with replacing(folder, folder=True, what="model") as unfinished:
        preset = TINY_PRESETS[channels]
        save_model(unfinished, transformer, vae, text_encoder, tokenizer, preset, {_RANDOM_MARK: seed})
        if folder.exists():
            shutil.rmtree(folder.resolve())
    return folder


def save_model(
    folder: Path,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: bytes,
    preset: ModelPreset,
    notes: dict | None = None,
) -> None:
    """Write a model in the layout of diffusers' WanPipeline, and its preset as `rolling_kv.json`.

    tokenizer: a sentencepiece unigram model, as `train_tokenizer` makes it. notes: further entries of rolling_kv.json.
    """
    flow = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=preset.sampling.shift
    )
    parts = {"scheduler": flow, "text_encoder": text_encoder, "transformer": transformer, "vae": vae}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    save_tokenizer(folder / "tokenizer", tokenizer)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"tokenizer": ["transformers", "T5TokenizerFast"]}
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "rolling_kv.json", {"preset": preset.to_dict()} | (notes or {}))


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the name of a new folder")
    mark = folder / "rolling_kv.json"
    if not mark.is_file() or _RANDOM_MARK not in json.loads(mark.read_text(encoding="utf-8")):
        raise ValueError(f"{folder} holds something else than a random tiny model: give the name of a new folder")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


@torch.no_grad()
def _randomize(model: Model, seed: int) -> Model:
    """Fill in weights that depend on the seed and on each parameter's name alone, not on a library's initialisation."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model.eval()


def train_tokenizer(sentences: Iterable[str], size: int = VOCABULARY) -> bytes:
    """Train a sentencepiece unigram model of at most `size` pieces, special tokens as in UMT5; its bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=size,
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="identity", num_threads=1,
        minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece=_PAD, eos_piece=_EOS, unk_piece=_UNKNOWN,
    )  # fmt: skip
    return model.getvalue()


def save_tokenizer(folder: Path, model: bytes) -> None:
    """Write a sentencepiece unigram model and the same tokenizer as tokenizer.json, in the layout of T5's.

    Both, because transformers reads a sentencepiece model only where protobuf is installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id()))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_EOS}", pair=f"$A {_EOS} $B {_EOS}", special_tokens=[(_EOS, pieces.eos_id())]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (_PAD, _EOS, _UNKNOWN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": TEXT_LENGTH}
    config |= {"pad_token": _PAD, "eos_token": _EOS, "unk_token": _UNKNOWN}
    _write_json(folder / "tokenizer_config.json", config)


def corpus() -> Iterator[str]:
    """English prompts, from a small grammar, and every ASCII character, so that nothing typed is unknown."""
    subjects = "circle square triangle ball star cat dog horse bird boat car train flower tree wave".split()
    looks = "red green blue yellow orange purple white black small large bright dark old young".split()
    actions = (
        "moving left, moving right, going up, going down, bouncing, spinning around, standing still, walking slowly, "
        "running fast, flying high, falling from the sky, growing larger, turning towards the camera"
    ).split(", ")
    places = (
        "on a grey background, on a white background, across the stormy sea at dawn, in a forest, over the hills, "
        "through the city at night, in the rain, under the stars, along the beach at sunset, with mountains behind it"
    ).split(", ")
    for index, (subject, look, action) in enumerate(itertools.product(subjects, looks, actions)):
        yield f"a {look} {subject} {action} {places[index % len(places)]}"
    for character in map(chr, range(33, 127)):
        yield f"{character} {character}"
