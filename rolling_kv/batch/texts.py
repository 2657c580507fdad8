"""Prompts that were encoded somewhere else, in the place of a text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import load, save

from ..text import TextEncoder

Shot = tuple[torch.Tensor, torch.Tensor | None]
"""What `TextEncoder.encode_shot` makes of a prompt."""


class KnownTexts:
    """Does what a pipeline asks of a `TextEncoder`, for texts that it knows.

    shots: of each prompt what `encode_shot` has made. plain: of each negative prompt what `encode` has made, [1, L, D].
    words: what `remark` has said about them.
    """

    def __init__(self, shots: Mapping[str, Shot], plain: Mapping[str, torch.Tensor], words: str = ""):
        self._shots, self._plain, self._words = dict(shots), dict(plain), words

    @classmethod
    def of(cls, encoder: TextEncoder, prompts: Iterable[str], negative: Iterable[str], marker: str) -> KnownTexts:
        """Encode them. marker: how prompts begin that begin a shot, as `ModelPreset.cut_marker` has it."""
        prompts = list(prompts)
        shots = {prompt: encoder.encode_shot(prompt, marker) for prompt in prompts}
        return cls(shots, {text: encoder.encode([text]) for text in negative}, encoder.remark(prompts))

    def packed(self) -> bytes:
        """As bytes that another process can read without running anything of them."""
        tensors, texts = {}, {"shots": list(self._shots), "plain": list(self._plain), "words": self._words}
        for number, (first, after) in enumerate(self._shots.values()):
            tensors[f"shots.{number}"] = first
            if after is not None:
                tensors[f"after.{number}"] = after
        tensors |= {f"plain.{number}": text for number, text in enumerate(self._plain.values())}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"texts": json.dumps(texts)})

    @classmethod
    def unpacked(cls, packed: bytes) -> KnownTexts:
        """What `packed` has packed."""
        length = int.from_bytes(packed[:8], "little")
        texts = json.loads(json.loads(packed[8 : 8 + length])["__metadata__"]["texts"])
        tensors = load(packed)
        shots = {text: (tensors[f"shots.{at}"], tensors.get(f"after.{at}")) for at, text in enumerate(texts["shots"])}
        return cls(shots, {text: tensors[f"plain.{at}"] for at, text in enumerate(texts["plain"])}, texts["words"])

    def remark(self, prompts: Iterable[str]) -> str:
        return self._words

    def encode(self, prompts: list[str]) -> torch.Tensor:
        return torch.cat([self._plain[prompt] for prompt in prompts])

    def encode_shot(self, prompt: str, marker: str = "") -> Shot:
        return self._shots[prompt]
