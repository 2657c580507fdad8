"""Options of the command line that several commands share, and the settings that they make."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from .config import ALL_FRAMES, CACHE_STORAGES, POSITIONS, CacheConfig, ExecutionConfig
from .devices import usable_device


def frames_or_all(text: str) -> int | Literal["all"]:
    """A window as people write it: a number of latent frames, or `all`."""
    if text == ALL_FRAMES:
        return ALL_FRAMES
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number of latent frames or {ALL_FRAMES}, got {text!r}") from None


def add_window(parser: argparse.ArgumentParser, whose: str) -> None:
    """The option for how much the cache keeps. whose: the window that holds where it is left out."""
    parser.add_argument(
        "--window",
        type=frames_or_all,
        metavar="N",
        help=f"latent frames that a chunk attends to, or {ALL_FRAMES} (default: {whose})",
    )


def add_cache(parser: argparse.ArgumentParser, whose: str, note: str = "") -> None:
    """Options of the cache. whose: settings that hold where an option is left out. note: put behind each help text."""
    add_window(parser, whose)
    parser.add_argument(
        "--sink",
        type=int,
        metavar="N",
        help=f"first latent frames that never leave the window (default: {whose}){note}",
    )
    parser.add_argument(
        "--positions", choices=POSITIONS, help=f"where the sink's keys stand in time (default: {whose}){note}"
    )
    parser.add_argument(
        "--cache-storage", choices=CACHE_STORAGES, default="model", help=f"how the cache keeps its bytes{note}"
    )
    parser.add_argument("--offload-cache", action="store_true", help=f"keep the cache in CPU memory{note}")


def cache_of(args: argparse.Namespace, default: CacheConfig) -> CacheConfig:
    """The cache settings that `add_cache` has read. default: for what was left out. Raises ValueError for bad ones."""
    chosen = {"window": args.window, "sink": args.sink, "positions": args.positions}
    chosen |= {"storage": args.cache_storage, "offload": args.offload_cache}
    return replace(default, **{name: value for name, value in chosen.items() if value is not None})


def add_device(parser: argparse.ArgumentParser, help: str) -> None:
    """The option for where to compute; `args.device` is a `torch.device` that works here."""
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help=help)


def _device(name: str) -> torch.device:
    try:
        return usable_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_execution(parser: argparse.ArgumentParser, note: str = "") -> None:
    """One option for each field of `ExecutionConfig`. note: put behind each help text."""
    for setting in fields(ExecutionConfig):
        form: dict[str, Any] = {"action": "store_true"}
        if choices := setting.metadata.get("choices"):
            form = {"choices": choices}
        name = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(name, dest=setting.name, help=f"{setting.metadata['help']}{note}", **form)


def execution_of(args: argparse.Namespace) -> ExecutionConfig:
    """The settings that `add_execution` has read; not checked yet."""
    return ExecutionConfig(**{setting.name: getattr(args, setting.name) for setting in fields(ExecutionConfig)})
