"""Prompt embeddings: UMT5 and its tokenizer, from a diffusers folder or from single files.

A prompt becomes the tokens that ComfyUI's Wan CLIP makes of it, and the encoder's arithmetic is float32 whatever dtype
the weights are stored in, as there. So CLIPTextEncode and `TextEncoder.encode` give the same embedding, to rounding.
What differs: ComfyUI's weight syntax "(word:1.2)", which is text here, and HTML entities, which are resolved here.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import sentencepiece
import tokenizers
import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from .checkpoints.dtypes import choose_dtype
from .checkpoints.float8 import load_tensor, split_scales
from .checkpoints.gguf import TOKENIZER_TENSOR, unpack, unpacked_shapes
from .checkpoints.names import UMT5, check_fit, count_layers, kind_of
from .checkpoints.readers import Checkpoint, CheckpointError, known_fields, open_checkpoint, telling
from .config import check_choice, check_real, check_whole
from .geometry import TEXT_LENGTH
from .messages import listed, printable, shortened
from .words import Words, read_words

_FILES = "umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors"
_NOT_IN_SHAPES = {
    "relative_attention_max_distance": partial(check_whole, low=2, high=2**20),
    "layer_norm_epsilon": partial(check_real, low=0, high=1),
    "eos_token_id": partial(check_whole, low=0, high=2**31),
    "feed_forward_proj": partial(check_choice, choices=("gated-gelu", "gated-gelu_new", "gated-silu", "gated-relu")),
}
_OTHER_NAMES = (  # those of the original Wan release and of llama.cpp (GGUF files), and transformers'
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"^token_embd\.", "shared."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenizer:
    """encode: text to token ids, without special tokens. size: number of ids."""

    encode: Callable[[str], list[int]]
    size: int


class TextEncoder(nn.Module):
    """UMT5 with its tokenizer. It has no `device` attribute, so that a memory manager may assign one.

    Weights may be stored in half precision, and those of the blocks in float8; a block is float32 while it runs.

    words: those that the model understands, where it says so because they are few.
    """

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: Tokenizer, words: Words | None = None):
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.words = words
        values = encoder.shared.weight.dtype
        for block in encoder.encoder.block:
            if any(parameter.dtype != torch.float32 for parameter in block.parameters()):
                block.forward = _in_float32(block, block.forward, values)
        encoder.encoder.final_layer_norm.float()

    @property
    def dim(self) -> int:
        """Width of the embeddings; 4096 for UMT5-XXL."""
        return self.encoder.config.d_model

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are stored; the table of the tokens counts once."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    @property
    def working_nbytes(self) -> int:
        """Bytes that encoding a prompt takes beside the weights: the largest block in float32, and what it computes."""
        config, narrow = self.encoder.config, [p for p in self.encoder.encoder.parameters() if p.dtype != torch.float32]
        block = max(
            sum(parameter.numel() for parameter in block.parameters() if parameter.dtype != torch.float32)
            for block in self.encoder.encoder.block
        )
        one = max((parameter.numel() for parameter in narrow if parameter.dtype.itemsize == 1), default=0)
        scores = cast(int, config.num_heads) * TEXT_LENGTH
        made = TEXT_LENGTH * max(4 * cast(int, config.d_ff), 5 * scores)
        return (block + max(one, made)) * torch.float32.itemsize

    def device_in(self, device: torch.device, room: int) -> torch.device:
        """Where to run: `device`, or the CPU where it takes more than `room`, the bytes that can be had there.

        The log then says so.
        """
        needed = self.nbytes + self.working_nbytes
        if device.type == "cpu" or needed <= room:
            return device
        logger.warning(
            "The text encoder runs on the CPU: it takes %.1f GiB, and %.1f can be had on %s.",
            needed / 2**30,
            max(room, 0) / 2**30,
            device,
        )
        return torch.device("cpu")

    def compute_device(self) -> torch.device:
        """Where the weights are now."""
        return self.encoder.shared.weight.device

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt, the closing EOS included, at most 512; whatever exceeds that is cut off.

        Raises ValueError for text that is none: half of a character, as a cut through an emoji leaves it.
        """
        ids = self.tokenizer.encode(clean(prompt))
        if len(ids) >= TEXT_LENGTH:
            logger.warning("The prompt has %d tokens; the model reads the first %d.", len(ids), TEXT_LENGTH - 1)
        eos = cast(int, self.encoder.config.eos_token_id)  # the annotation allows several
        return ids[: TEXT_LENGTH - 1] + [eos]

    def remark(self, prompts: Iterable[str]) -> str:
        """What to say about the words of prompts that the model does not know; empty where there is nothing to say."""
        return self.words.remark(map(clean, prompts)) if self.words else ""

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Embed prompts: float32 [B, 512, dim] on the encoder's device, zero after each prompt's EOS.

        A prompt is encoded alone and unpadded: padding is invisible to the encoder, and so a prompt's embedding does
        not depend on its neighbours, nor cost more than its own length. Raises ValueError when the weights make values
        that are no numbers.
        """
        embeddings = torch.zeros(len(prompts), TEXT_LENGTH, self.dim, device=self.compute_device())
        for row, prompt in zip(embeddings, prompts):
            ids = torch.tensor([self.tokens(prompt)], device=row.device)
            row[: ids.shape[1]] = self.encoder(ids).last_hidden_state[0]
        if not embeddings.isfinite().all():
            raise ValueError(
                "the text encoder makes values that are no numbers (NaN or infinity): its weights are damaged. Download "
                "its file again, or use another one."
            )
        return embeddings

    def encode_shot(self, prompt: str, marker: str) -> tuple[Tensor, Tensor | None]:
        """Embed a prompt, and what its shot goes on with where it begins one: the same text without the marker.

        marker: how prompts begin that begin a shot, as `ModelPreset.cut_marker` has it; empty where none does.
        Returns two embeddings as of `encode`, the second None where the prompt begins no shot.
        """
        text = clean(prompt)
        begins = bool(marker) and text.startswith(marker)
        return self.encode([prompt]), self.encode([text.removeprefix(marker)]) if begins else None


def _in_float32(block: nn.Module, stock_forward: Callable, values: torch.dtype) -> Callable:
    """A `forward` for a block whose weights are float32 while it runs, and then what they were, where they were.

    values: dtype that weights in float8 are rounded to once they are multiplied by their scales.
    """

    def widened(module: nn.Module, parameter: Tensor) -> nn.Parameter:
        wide = parameter.to(torch.float32)
        if parameter.dtype.itemsize == 1 and (scale := getattr(module, "scale", None)) is not None:
            wide.mul_(scale)
            wide.copy_(wide.to(values))
        return nn.Parameter(wide, requires_grad=False)

    def forward(*args, **kwargs):
        stored = [
            (m, name, parameter) for m in block.modules() for name, parameter in m.named_parameters(recurse=False)
        ]
        try:
            for module, name, parameter in stored:
                setattr(module, name, widened(module, parameter))
            return stock_forward(*args, **kwargs)
        finally:
            for module, name, parameter in stored:
                setattr(module, name, parameter)

    return forward


def clean(prompt: str) -> str:
    """A prompt as Wan was trained on it: HTML entities resolved, runs of white space made one space.

    Raises ValueError for text that is none: half of a character, as a cut through an emoji leaves it.
    """
    text = " ".join(html.unescape(html.unescape(prompt)).split())
    if half := re.search(r"[\ud800-\udfff]", text):
        raise ValueError(
            f"the prompt has half of a character in it ({ascii(half[0])} at character {half.start() + 1}), such as a cut "
            "through an emoji leaves: type that part again"
        )
    return text


@torch.inference_mode(False)
def load_text_encoder(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    runs_on: str | torch.device | None = None,
) -> TextEncoder:
    """Load UMT5 and its tokenizer.

    path: a diffusers folder (with text_encoder/ in it, or that folder itself), or a single file: ComfyUI's
        umt5_xxl_*.safetensors, scaled float8 too, the original models_t5_umt5-xxl-enc-bf16.pth, or a .gguf file, whose
        weights are unpacked: it is small on disk, not in memory.
    tokenizer: spiece.model or tokenizer.json, or a folder with one of them. By default the one inside the file, else
        one beside it: in tokenizer/, google/umt5-xxl/ or the same folder.
    dtype: what the weights are stored in: "float32", "float16", "bfloat16", a torch dtype, or "auto": the file's own, and
        on CUDA float32 as bfloat16. Weights of the blocks that a file has in float8 then stay so, with their scales, and
        give what they give in bfloat16; with anything else they are widened as they are loaded.
    runs_on: the device that "auto" chooses for, where the encoder is loaded to another one first.

    Raises CheckpointError for a file that is no UMT5, with what it is instead, what is missing or what to do.
    """
    path = Path(path)
    with telling(path):
        source = path / "text_encoder" if (path / "text_encoder").is_dir() else path
        checkpoint = open_checkpoint(source)
        pieces = checkpoint.tensors.get(TOKENIZER_TENSOR)
        weights, scales = _weights(checkpoint)
        shapes = unpacked_shapes(weights)
        config = _config(shapes, checkpoint.config)
        stays = dtype == "auto"
        dtype = choose_dtype(dtype, shapes, runs_on or device, instead=torch.bfloat16)  # a block computes in float32
        encoder = _empty_encoder(shapes, config)
        needed = [name for name in encoder.state_dict() if name != "encoder.embed_tokens.weight"]
        loaded = {}
        for name in needed:
            layer, weight = encoder.get_submodule(name.rpartition(".")[0]), unpack(weights[name])
            if stays and isinstance(layer, nn.Linear) and weight.dtype.itemsize == 1:
                scale = load_tensor(scales[name], None, torch.float32, device) if name in scales else None
                layer.register_buffer("scale", scale)
                loaded[name] = load_tensor(weight, None, weight.dtype, device)
            else:
                loaded[name] = load_tensor(weight, scales.get(name), dtype, device)
        encoder.load_state_dict(loaded, assign=True, strict=False)
        encoder.set_input_embeddings(encoder.shared)
        encoder.eval().requires_grad_(False)
        if tokenizer is not None:
            found = _read_tokenizer(Path(tokenizer))
        elif pieces is not None:
            if pieces.dtype != torch.uint8 or pieces.ndim != 1:
                raise CheckpointError(
                    f"{TOKENIZER_TENSOR}, the tokenizer inside the file, is {pieces.dtype} of {pieces.ndim} dimensions "
                    "instead of bytes. Download the file again."
                )
            found = _sentencepiece(pieces.numpy().tobytes())
        else:
            found = _read_tokenizer(_tokenizer_beside(source))
        if found.size > encoder.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {found.size} tokens and the text encoder {encoder.config.vocab_size}: they do not "
                "belong together."
            )
        words = read_words(source.absolute().parent) if source.is_dir() else None
    return TextEncoder(encoder, found, words)


def _weights(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != TOKENIZER_TENSOR}
    kind = kind_of(tensors)
    if kind != UMT5:
        raise CheckpointError(f"this is {kind}, not a UMT5 text encoder. Wan models need {_FILES}.")
    for pattern, name in _OTHER_NAMES:
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    shapes, scales = split_scales(unpacked_shapes(tensors))
    weights = {name: tensors[name] for name in shapes}
    weights.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
    return {name: weight for name, weight in weights.items() if not name.startswith(("decoder.", "lm_head."))}, scales


def _config(weights: dict[str, Tensor], given: dict) -> UMT5Config:
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    layers = count_layers(weights, r"encoder\.block\.")
    if layers > 1 and "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" not in weights:
        raise CheckpointError(f"this is the T5 of another family (as for Flux or SD3). Wan models need {_FILES}.")
    needed = (
        "shared.weight",
        f"{attention}.q.weight",
        f"{attention}.relative_attention_bias.weight",
        f"{feed_forward}.wi_0.weight",
    )
    missing = [name for name in needed if name not in weights]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing. The file is incomplete, or no UMT5; Wan models need {_FILES}.")
    flat = [name for name in needed if weights[name].ndim != 2]
    if flat:
        raise CheckpointError(
            f"{flat[0]} has the shape {list(weights[flat[0]].shape)[:8]}; a UMT5 has 2 dimensions there."
        )
    (vocabulary, dim), (inner, _), (buckets, heads), (ffn, _) = (weights[name].shape for name in needed)
    known = known_fields(given, _NOT_IN_SHAPES)
    if "layer_norm_epsilon" in known:  # transformers takes no whole number for it
        known["layer_norm_epsilon"] = float(known["layer_norm_epsilon"])
    if known.get("eos_token_id", 1) >= vocabulary:
        raise CheckpointError(
            f"its eos_token_id is {known.get('eos_token_id', 1)}, and the vocabulary has {vocabulary} tokens."
        )
    distance = known.get("relative_attention_max_distance", 128)
    if buckets < 4 or distance <= buckets // 4:
        raise CheckpointError(f"{buckets} buckets for distances up to {distance} are no position bias of a UMT5.")
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=ffn,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        **known,
    )


def _empty_encoder(weights: dict[str, Tensor], config: UMT5Config) -> UMT5EncoderModel:
    """The encoder on the meta device; raises CheckpointError unless the weights are exactly those it needs."""
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    needed = {name: value for name, value in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    check_fit(weights, needed, f"a UMT5 of {config.num_layers} layers")
    return encoder


def _tokenizer_beside(source: Path) -> Path:
    folder = source.absolute().parent
    places = [folder / "tokenizer", folder / "google" / "umt5-xxl", source if source.is_dir() else folder]
    for place in places:
        if (place / "spiece.model").exists() or (place / "tokenizer.json").exists():
            return place
    raise CheckpointError(
        "the tokenizer is missing: the file does not contain it, and there is no spiece.model or tokenizer.json in "
        f"{listed(list(map(str, places)))}. Put one there, or use {_FILES}, which contain it."
    )


def _read_tokenizer(path: Path) -> Tokenizer:
    """A SentencePiece model goes before the tokenizer.json that was converted from it."""
    if path.is_dir():
        path = path / ("spiece.model" if (path / "spiece.model").exists() else "tokenizer.json")
    if not path.exists():
        raise CheckpointError(f"there is no tokenizer {path}. Expected spiece.model, tokenizer.json, or their folder.")
    if path.suffix != ".json":
        return _sentencepiece(path.read_bytes())
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"the tokenizer {path} is damaged ({_said(error)}). Download it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.get_vocab_size())


def _sentencepiece(model: bytes) -> Tokenizer:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise CheckpointError(f"the SentencePiece tokenizer is damaged ({_said(error)}). Download it again.") from error
    if not processor.get_piece_size():
        raise CheckpointError("the SentencePiece tokenizer is empty. Download it again.")
    return Tokenizer(processor.encode, processor.get_piece_size())


def _said(error: Exception) -> str:
    return shortened(printable(str(error)), 160)
