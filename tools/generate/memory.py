"""The table of docs/memory.md: which settings fit which card, counted from the shapes of the models."""

from __future__ import annotations

import re

import torch
from diffusers import WanTransformer3DModel

from rolling_kv.checkpoints.float8 import store_float8
from rolling_kv.geometry import Geometry
from rolling_kv.planning import CHOICE_HEAD, Outline, choices, kept_in_ways, told_choice, weight_bytes
from rolling_kv.presets import PRESETS

from ..comfyui.env import PACK
from .files import write
from .readme import table

PAGE = PACK / "docs" / "memory.md"
CARDS = (6, 8, 12, 16, 24, 32, 48)
"""GiB of memory that cards have."""
MODELS = {  # by preset: layers, heads, inner size, channels of the latents
    "self-forcing": (30, 12, 8960, 16),
    "longlive": (30, 12, 8960, 16),
    "longlive2": (30, 24, 14336, 48),
    "krea-realtime": (40, 40, 13824, 16),
}


def outlines(name: str) -> dict[str, Outline]:
    """A family's model by the storage of its weights, from its shape alone."""
    layers, heads, inner, channels = MODELS[name]

    def kept(storage: str) -> Outline:
        with torch.device("meta"):
            transformer = WanTransformer3DModel(
                num_layers=layers, num_attention_heads=heads, attention_head_dim=128, ffn_dim=inner, in_channels=channels,
                out_channels=channels,
            )  # fmt: skip
        weights = weight_bytes(dict(transformer.named_parameters()), torch.bfloat16, storage)
        if storage == "float8":
            store_float8(transformer)
        return Outline(transformer, PRESETS[name], torch.bfloat16, weights, 1)

    return kept_in_ways({storage: kept(storage) for storage in ("model", "float8")})


def cards() -> str:
    """A row for each model and way to run it: what that takes, and the cards that have so much."""
    rows, above = (
        [["Model", *(head[0].upper() + head[1:] for head in CHOICE_HEAD), *(f"{card} GiB" for card in CARDS)]],
        "",
    )
    for name in MODELS:
        model = outlines(name)
        height, width = Geometry.of(model["model"].transformer).size
        for choice in choices(model, height, width, 0):
            title = f"{PRESETS[name].title} (`{name}`), {width}x{height}"
            fits = ["yes" if choice.device <= card * 2**30 else "" for card in CARDS]
            rows.append(["" if title == above else title, *told_choice(choice), *fits])
            above = title
    return table(rows)


def generated() -> str:
    """The page with its table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"^\| Model \|.*?(?=\n\n)", lambda _: cards().rstrip(), text, count=1, flags=re.M | re.S)


def generate() -> None:
    write(PAGE, generated())
