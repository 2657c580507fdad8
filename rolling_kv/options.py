"""Options of the command line that several commands share, and the settings that they make."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from .bundled import BUNDLED
from .config import ALL_FRAMES, CACHE_STORAGES, WEIGHT_STORAGES, CacheConfig, ExecutionConfig
from .devices import usable_device
from .presets import PRESETS
from .video import ENCODERS, PLAIN


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options for the model: its files, its LoRAs, and how its weights are kept."""
    parser.add_argument(
        "--model", type=Path, default=BUNDLED, help="a causal Wan model: a diffusers folder, .safetensors, .gguf or .pt"
    )
    parser.add_argument("--text-encoder", type=Path, help="UMT5, where the model is a single file")
    parser.add_argument(
        "--vae",
        type=Path,
        help="the Wan VAE of the model's latents, where the model is a single file; or a tiny decoder, taew2_1",
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "STRENGTH"),
        help="a LoRA for the model, and how much of it (1 where left out); give it again for each further one",
    )
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="what the model was trained for")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="precision")
    parser.add_argument(
        "--weight-storage", choices=WEIGHT_STORAGES, default="model", help="how the model's weights are kept in memory"
    )


def add_offload(parser: argparse.ArgumentParser) -> None:
    """The option for where the model's weights lie while they do not compute."""
    parser.add_argument(
        "--offload-weights",
        action="store_true",
        help="keep the model's weights in CPU memory, and bring one block at a time to the device",
    )


def loras_of(args: argparse.Namespace) -> list[tuple[Path, float]]:
    """The LoRA files that `add_model` has read, each with its strength. Raises ValueError for what is no strength."""
    return [_lora(*values) for values in args.lora]


def _lora(file: str, *strength: str) -> tuple[Path, float]:
    try:
        return Path(file), float(*strength or ("1",))
    except (TypeError, ValueError):
        raise ValueError(
            f"--lora takes a file and a number, its strength; got {' '.join([file, *strength])}. Give --lora again for "
            "each further file."
        ) from None


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


def add_cache(parser: argparse.ArgumentParser, whose: str, note: str = "", switches: bool = True) -> None:
    """Options of the cache.

    whose: settings that hold where an option is left out. note: put behind each help text. switches: whether prompts can
    change.
    """
    add_window(parser, whose)
    rules = [rule for rule in _described(CacheConfig) if switches or "at_switch" not in rule.metadata]
    _add_fields(parser, rules, f" (default: {whose}){note}", flag=argparse.BooleanOptionalAction)
    parser.add_argument(
        "--cache-storage", choices=CACHE_STORAGES, default="model", help=f"how the cache keeps its bytes{note}"
    )
    parser.add_argument("--offload-cache", action="store_true", help=f"keep the cache in CPU memory{note}")


def rules_of(args: argparse.Namespace) -> dict[str, Any]:
    """The rules among the cache settings that `add_cache` has read, without what was left out."""
    given = {name: getattr(args, name, None) for name in ("window", *(rule.name for rule in _described(CacheConfig)))}
    return {name: value for name, value in given.items() if value is not None}


def cache_of(args: argparse.Namespace, default: CacheConfig) -> CacheConfig:
    """The cache settings that `add_cache` has read. default: for what was left out. Raises ValueError for bad ones."""
    return default.with_rules(**rules_of(args), storage=args.cache_storage, offload=args.offload_cache)


def add_device(parser: argparse.ArgumentParser, help: str) -> None:
    """The option for where to compute; `args.device` is a `torch.device` that works here."""
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help=help)


def _device(name: str) -> torch.device:
    try:
        return usable_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """The option for what encodes videos."""
    parser.add_argument(
        "--encoder",
        choices=ENCODERS,
        default=PLAIN,
        help="what encodes the video; x264 where another does not open here",
    )


def add_execution(parser: argparse.ArgumentParser, note: str = "") -> None:
    """One option for each field of `ExecutionConfig`. note: put behind each help text."""
    _add_fields(parser, _described(ExecutionConfig), note, flag="store_true")


def execution_of(args: argparse.Namespace) -> ExecutionConfig:
    """The settings that `add_execution` has read; not checked yet."""
    return ExecutionConfig(**{setting.name: getattr(args, setting.name) for setting in fields(ExecutionConfig)})


def _described(settings: type) -> list[Field]:
    """The fields of a settings class that say what they are for."""
    return [setting for setting in fields(settings) if "help" in setting.metadata]


def _add_fields(parser: argparse.ArgumentParser, settings: list[Field], note: str, flag: Any) -> None:
    """An option for each field. flag: what argparse does with one that is on or off."""
    for setting in settings:
        form = {"action": flag} if setting.type == "bool" else _form(setting)
        name = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(name, dest=setting.name, help=f"{setting.metadata['help']}{note}", **form)


def _form(setting: Field) -> dict[str, Any]:
    """How argparse reads a field: by its choices, or as numbers; whole ones are latent frames."""
    if choices := setting.metadata.get("choices"):
        return {"choices": choices}
    if isinstance(setting.default, tuple):
        return {"nargs": len(setting.default), "type": float, "metavar": "X"}
    return {"type": float, "metavar": "X"} if setting.type == "float" else {"type": int, "metavar": "N"}
