"""What the commands of the benchmark have in common: arguments, checks before anything runs, the number of threads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..bundled import BUNDLED, check_model
from ..options import add_device, add_window
from ..presets import PRESETS
from .random_model import SIZES


class Subcommands(argparse._SubParsersAction):
    """Refuses options before the name of a subcommand: its own defaults would silently replace them."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        for action in parser._actions:
            if action.option_strings and getattr(namespace, action.dest, action.default) != action.default:
                parser.error(f"{action.option_strings[0]} stands before {values[0]!r}: write it behind")
        super().__call__(parser, namespace, values, option_string)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model to measure, or the size of a random one, and the video."""
    parser.add_argument("--model", type=Path, default=BUNDLED, help="as for generate (default: the bundled tiny model)")
    parser.add_argument("--text-encoder", type=Path, help="UMT5, where the model is a single file")
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="what the model was trained for")
    parser.add_argument("--prompt", default="a red circle moving left", help="default: %(default)s")
    parser.add_argument("--size", choices=SIZES, help="random weights of this shape instead of a model: no quality")
    parser.add_argument("--height", type=int, help="pixels (default: the size's; 64 for the bundled model, else 480)")
    parser.add_argument("--width", type=int, help="pixels (default: the size's; 64 for the bundled model, else 832)")
    add_window(parser, "the model's")


def add_dtype(parser: argparse.ArgumentParser, default: str = "bfloat16 on CUDA, else float32") -> None:
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help=f"default: {default}")


def add_machine(parser: argparse.ArgumentParser, *, memory: bool = True) -> None:
    """Where to run, and where to write the figures. memory: whether there are runs that follow it."""
    add_device(parser, "default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    if memory:
        parser.add_argument(
            "--no-memory", action="store_true", help="without CUDA: leave out the runs that follow memory"
        )
    parser.add_argument("--json", type=Path, metavar="F", help="write all figures to this file")


def check(args: argparse.Namespace, *counts: str) -> None:
    """Raise ValueError unless these arguments, --threads and the size are at least 1, files can be written, and --model is there."""
    for name in (*counts, "threads", "height", "width"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    plot = getattr(args, "plot", None)
    for path in filter(None, (args.json, plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist; make it first")
    if plot and plot.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG picture: name it .png, not {plot.name}")
    if hasattr(args, "model") and args.size is None:
        check_model(args.model)


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads of the CPU for a while; None: as many as it does anyway."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
