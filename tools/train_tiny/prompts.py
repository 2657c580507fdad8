"""The text side: a sentencepiece tokenizer of the prompt grammar, and a small UMT5 encoder that trains with the transformer."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import torch
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from rolling_kv.tiny import train_tokenizer

from .world import random_scene

TEXT_CONFIG = dict(
    d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, tie_word_embeddings=False
)
EOS = 1
LONGEST = 16
"""Tokens of the longest prompt of the grammar, rounded up: one shape for all batches."""


def make_tokenizer(path: Path, seed: int = 2) -> None:
    """Write a unigram model that has the grammar's words as single pieces and can still spell any other English word.

    A word becomes a single piece only when it is also seen with something after it.
    """
    generator = torch.Generator().manual_seed(seed)
    lines = [random_scene(generator).prompt for _ in range(2000)]
    lines += [f"{character} {character}" for character in map(chr, range(33, 127))]
    lines += [word + ending for line in lines[:2000] for word in line.split() for ending in ",.s"]
    path.write_bytes(train_tokenizer(lines))


class TextSide(nn.Module):
    """Tokens and embeddings of prompts."""

    def __init__(self, spiece: Path):
        super().__init__()
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
        self.encoder = UMT5EncoderModel(UMT5Config(vocab_size=self.tokenizer.get_piece_size(), **TEXT_CONFIG))
        self.known: dict[str, list[int]] = {}

    def tokens(self, prompt: str) -> list[int]:
        if prompt not in self.known:
            self.known[prompt] = self.tokenizer.encode(prompt) + [EOS]
        return self.known[prompt]

    def forward(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, L, D], zero after each prompt's end, and the numbers of tokens [N]."""
        rows = [self.tokens(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), max(LONGEST, int(lengths.max())), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        used = torch.arange(ids.shape[1]) < lengths[:, None]
        return self.encoder(ids, attention_mask=used.long()).last_hidden_state * used[..., None], lengths
