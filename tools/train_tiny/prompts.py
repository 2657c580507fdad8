"""The text side: what prompts say and leave unsaid, a tokenizer of whole words, and a small UMT5 encoder.

The tokenizer knows the words of the grammar and has one token for all others. So whatever else is typed, in any language,
looks like what training has shown: a word that says nothing. Synonyms and other spellings of a word share its embedding
and need no training.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from .starts import OPEN
from .world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, Scene, chance, pick

TEXT_CONFIG = dict(
    d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, tie_word_embeddings=False
)
EOS = 1
LENGTHS = (28, 92)
"""Tokens to which batches of prompts are padded: few shapes, so that a compiled step fits them all. The second is for
prompts as people write them for large models, of which hardly a word is known."""
ATTRIBUTES = ("size", "colour", "shape", "speed", "direction", "background")
EVERYTHING = frozenset(ATTRIBUTES)
PLAIN = 0.45
"""Share of the prompts in the plain grammar; the others leave out, add and turn around."""

WORDS = {
    "a": "an the one 一个",
    "small": "little tiny 小",
    "big": "large huge 大",
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "violet magenta 紫色",
    "cyan": "turquoise 青色",
    "circle": "disc disk ball 圆形 圆圈",
    "square": "box 正方形 方块",
    "triangle": "三角形",
    "moving": "moves going gliding floating 移动",
    "standing": "stands staying",
    "still": "motionless static 静止",
    "slowly": "slow 慢慢 缓慢",
    "quickly": "fast quick 快速",
    "left": "向左",
    "right": "向右",
    "up": "向上",
    "down": "向下",
    "and": "",
    "on": "",
    "black": "黑色",
    "grey": "gray 灰色",
    "white": "白色",
    "navy": "深蓝色",
    "background": "背景",
}
"""The words of the grammar, and other words for them."""
NEUTRAL = "a and on moving standing background"
"""Words that alone say nothing that could be seen."""


def spellings(word: str) -> Iterator[str]:
    """The word as pieces of the tokenizer: in small letters, capitalised, in capitals; Chinese stands without spaces."""
    if not word.isascii() and word.upper() == word:
        yield word
    else:
        yield from dict.fromkeys("▁" + spelled for spelled in (word, word.capitalize(), word.upper()))


def make_tokenizer(path: Path) -> None:
    """Write a sentencepiece unigram model of whole words; every other character is unknown."""
    pieces = {"▁": None} | {"▁" + word: None for word in WORDS}
    for word, others in WORDS.items():
        pieces |= dict.fromkeys(piece for other in (word, *others.split()) for piece in spellings(other))
    special = [("<pad>", 3), ("</s>", 3), ("<unk>", 2)]  # the types of control and unknown pieces; 1 is a normal one
    fields = [field for field in _fields(_any_model()) if field[0] != _tag(1)]
    # A longer piece costs as much as a short one, and an unknown character more: as few pieces as possible win.
    rows = [_piece(name, 0.0, kind) for name, kind in special] + [_piece(name, -1.0, 1) for name in pieces]
    path.write_bytes(b"".join(rows) + b"".join(head + body for head, body in fields))


def canonical(tokenizer: sentencepiece.SentencePieceProcessor) -> torch.Tensor:
    """For each token, the token whose embedding it shares."""
    same = torch.arange(tokenizer.get_piece_size())
    for word, others in WORDS.items():
        for other in (word, *others.split()):
            for piece in spellings(other):
                same[tokenizer.piece_to_id(piece)] = tokenizer.piece_to_id("▁" + word)
    return same


def _any_model() -> bytes:
    """A sentencepiece model whose settings are right; its pieces are not."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_writer=model, model_type="unigram", vocab_size=12,
        hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
    )  # fmt: skip
    return model.getvalue()


# A model is a protobuf message: pieces (field 1: text, score, type), then messages with settings.
def _tag(field: int, wire: int = 2) -> bytes:
    return bytes([field << 3 | wire])


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _piece(text: str, score: float, kind: int) -> bytes:
    score_bytes = torch.tensor(score).numpy().astype("<f4").tobytes()
    name = text.encode()
    body = _tag(1) + _varint(len(name)) + name + _tag(2, 5) + score_bytes + _tag(3, 0) + _varint(kind)
    return _tag(1) + _varint(len(body)) + body


def _fields(message: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a message, all of variable length: tag, and length with content."""
    found, at = [], 0
    while at < len(message):
        size, digit, end = 0, 0, at + 1
        while True:
            size |= (message[end] & 127) << 7 * digit
            digit, end = digit + 1, end + 1
            if message[end - 1] < 128:
                break
        found.append((message[at : at + 1], message[at + 1 : end + size]))
        at = end + size
    return found


def describe(
    scene: Scene,
    generator: torch.Generator,
    must: frozenset[str] = frozenset(),
    may: frozenset[str] = EVERYTHING,
    room: int = 6,
) -> tuple[str, frozenset[str]]:
    """A prompt for `scene`, and the attributes that it says.

    must, may: attributes that it has to and is allowed to say. room: at most so many unknown words.
    """
    may = (may | must) - ({"direction"} if scene.speed == "still" else frozenset())
    wanted = EVERYTHING - ({"direction"} if scene.speed == "still" else frozenset())
    if may >= wanted and chance(generator) < PLAIN:
        if scene.background != "black":
            return scene.prompt, wanted
        if "background" in must or chance(generator) < 0.15:
            return scene.prompt + " on a black background", wanted
        return scene.prompt, wanted - {"background"}
    nothing = not must and chance(generator) < 0.12
    said = frozenset(
        name for name in ATTRIBUTES if name in may and (name in must or not nothing and chance(generator) < 0.65)
    )
    return _worded(scene, said, generator, room), said


def _worded(scene: Scene, said: frozenset[str], generator: torch.Generator, room: int) -> str:
    """A prompt that says so much of `scene`, with words in it that say nothing."""

    def perhaps(share: float) -> bool:
        return chance(generator) < share

    units = ["a"] if perhaps(0.5) else []
    units += [getattr(scene, name) for name in ("size", "colour") if name in said]
    if "colour" not in said and perhaps(0.12):
        units.append(pick(("white", "black", "grey"), generator))  # no colour of a shape
    units += [scene.shape] if "shape" in said else []
    rival = said >= {"colour", "shape"} and perhaps(0.12)
    if rival:  # what is said first holds
        units.append(f"and a {pick(COLOURS, generator)} {pick(SHAPES, generator)}")
    motion = []
    if "speed" in said:
        motion = ["standing still" if perhaps(0.6) else "still"] if scene.speed == "still" else [scene.speed]
        if scene.speed != "still" and (not scene.speed or perhaps(0.8)):
            motion.insert(0, "moving")
    if "direction" in said:
        motion.insert(len(motion) if perhaps(0.7) else min(1, len(motion)), scene.direction)
    ends = [" ".join(word for word in motion if word)] if motion else []
    if "background" in said:
        ends.append(("on a " if perhaps(0.6) else "") + f"{scene.background} background")
    units += ends
    if not rival and perhaps(0.35):
        units = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
    for _ in range(int(torch.randint(room + 1, (), generator=generator)) if perhaps(0.7) else 0):
        units.insert(int(torch.randint(len(units) + 1, (), generator=generator)), "?")
    if perhaps(0.25):
        units = [unit + "," if perhaps(0.4) else unit for unit in units]
    return " ".join(units)


class TextSide(nn.Module):
    """Tokens and embeddings of prompts."""

    def __init__(self, spiece: Path):
        super().__init__()
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
        self.canonical = canonical(self.tokenizer).tolist()
        self.encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(self.canonical), **TEXT_CONFIG))

    def tokens(self, prompt: str) -> list[int]:
        ids = [self.canonical[token] for token in self.tokenizer.encode(prompt)]
        return ids[: LENGTHS[-1] - 1] + [EOS]

    def forward(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, L, D], zero after each prompt's end, and the numbers of tokens [N]."""
        rows = [self.tokens(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), next(size for size in LENGTHS if size >= lengths.max()), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        used = torch.arange(ids.shape[1]) < lengths[:, None]
        return self.encoder(ids, attention_mask=used.long()).last_hidden_state * used[..., None], lengths

    def shipped(self) -> UMT5EncoderModel:
        """The encoder with the embeddings of all spellings."""
        with torch.no_grad():
            self.encoder.shared.weight.copy_(self.encoder.shared.weight[self.canonical])
        return self.encoder


def vocabulary() -> dict:
    """The words that the model knows, as `rolling_kv.words` reads them: by kind, and others that are no news; and what is shown
    where a prompt says nothing."""
    known = {
        "sizes": list(SIZES),
        "colours": list(COLOURS),
        "shapes": list(SHAPES),
        "motion": ["moving", "slowly", "quickly", "standing still"],
        "directions": [name for name in DIRECTIONS if " " not in name],
        "backgrounds": [f"{name} background" for name in BACKGROUNDS],
    }
    also = [*NEUTRAL.split(), "still"]
    for word, others in WORDS.items():
        if word in BACKGROUNDS:  # alone they say nothing
            also += [other + (" background" if other.isascii() else "背景") for other in others.split()]
        else:
            also += others.split()
    return {"known": known, "also": also, "otherwise": Scene(**OPEN).prompt}
