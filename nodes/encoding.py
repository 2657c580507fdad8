"""Prompts become embeddings, wherever a node needs them: the same text has the same bits from all of them."""

from __future__ import annotations

import comfy.model_management as mm

from ..rolling_kv.geometry import TEXT_LENGTH
from ..rolling_kv.presets import CUT_MARKERS
from ..rolling_kv.sampling.steering import Shot
from ..rolling_kv.text import clean
from .patchers import ManagedModule


def encode_shot(encoder: ManagedModule, text: str) -> Shot:
    """The embeddings of a prompt, as `TextEncoder.encode_shot` makes them for whichever family has its marker.

    encoder: with its weights on their device.
    """
    marker = next((marker for marker in CUT_MARKERS if clean(text).startswith(marker)), "")
    first, after = encoder.model.encode_shot(text, marker)
    device = mm.intermediate_device()
    return first.to(device), None if after is None else after.to(device)


def check_length(encoder: ManagedModule, text: str) -> None:
    """Raise ValueError for a prompt of which the model would not read the end."""
    tokens = len(encoder.model.tokenizer.encode(clean(text)))
    if tokens >= TEXT_LENGTH:
        raise ValueError(f"the prompt has {tokens} tokens, of which the model reads {TEXT_LENGTH - 1}: make it shorter")
