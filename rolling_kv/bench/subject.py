"""What is measured where the same video is made in several ways: a model, its prompt, and the size and length of the video."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..bundled import default_size
from ..checkpoints.model import CausalModel, load_model
from ..text import load_text_encoder
from . import options
from .figures import hardware
from .random_model import SIZES, random_model, random_prompt


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What every way shares.

    name: of the model, for people.
    model: few-step, without a recomputed context.
    prompt: embedding [1, L, D].
    height, width: pixels.
    chunks: of the video, all from noise of `seed`.
    repeats: timed videos of each way.

    Raises ValueError for a video size or a window that the model does not take, and for a model that makes chunks together or
    asks for a VAE.
    """

    name: str
    model: CausalModel
    prompt: Tensor
    height: int
    width: int
    chunks: int
    repeats: int = 3
    seed: int = 0

    def __post_init__(self):
        preset = self.model.preset
        self.model.geometry.latent_size(self.height, self.width)
        preset.sampling.check_cache(preset.cache)
        if preset.sampling.guided or preset.sampling.joint or preset.cache.context == "recomputed":
            raise ValueError(
                "this compares models that make one chunk after the other, without guidance and without a VAE: choose "
                "another --preset"
            )

    @property
    def device(self) -> torch.device:
        return self.model.compute_device()

    def describe(self) -> str:
        """Two lines: the model and the video, then the machine."""
        chunk, dtype = self.model.preset.sampling.chunk, str(self.model.dtype).removeprefix("torch.")
        return (
            f"{self.name}; {self.height}x{self.width}, {self.chunks} chunks of {chunk} latent frames, {dtype}\n"
            f"{hardware(self.device)}"
        )


def add_arguments(parser: argparse.ArgumentParser, chunks: int) -> None:
    """Options of a subject. chunks: by default."""
    options.add_model(parser)
    options.add_dtype(parser)
    parser.add_argument("--chunks", type=int, default=chunks, help="length of each video (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed videos of each way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the video's noise (default: %(default)s)")
    options.add_machine(parser, memory=False)


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the subject that `add_arguments` has read: a model from a file, or random weights of a size."""
    device, dtype = args.device, options.dtype_of(args)
    if args.size:
        size = SIZES[args.size]
        model = random_model(args.size, dtype, device)
        prompt = random_prompt(dtype, device, args.seed)
        name = f"{args.size}: {size.describe()}"
        height, width = size.height, size.width
    else:
        model = load_model(args.model, preset=args.preset, dtype=dtype, device=device)
        prompt = load_text_encoder(args.text_encoder or args.model, device=device).encode([args.prompt])
        name = f"{model.preset.name}, {args.prompt!r}"
        height, width = default_size(args.model, model.geometry)
    if args.window is not None:
        model.preset = replace(model.preset, cache=replace(model.preset.cache, window=args.window))
    return {
        "name": name,
        "model": model,
        "prompt": prompt,
        "height": args.height or height,
        "width": args.width or width,
        "chunks": args.chunks,
        "repeats": args.repeats,
        "seed": args.seed,
    }


def beside(model: CausalModel) -> CausalModel:
    """A model of its own around the same weights: a transformer serves one open session at a time."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
