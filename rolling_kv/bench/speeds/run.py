"""The recorded cases and the bundled model's videos, made at each speed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from ...bundled import BUNDLED
from ...checkpoints.model import load_model
from ...config import ExecutionConfig
from ..cases.cli import recorded
from .imitation import fast_passes

CHUNKS = 5
"""Of each video that is looked at."""
SEED = 1


class Speed(NamedTuple):
    """A way to compute passes. products, attention, flash: what fast passes have, see `fast_passes`."""

    name: str
    execution: ExecutionConfig
    dtype: torch.dtype = torch.bfloat16
    products: bool = False
    attention: bool = False
    flash: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Its name and dtype, as a result has them."""
        return self.name, str(self.dtype).removeprefix("torch.")

    def chosen(self) -> AbstractContextManager:
        if not self.execution.fast:
            return nullcontext()
        return fast_passes(products=self.products, attention=self.attention, flash=self.flash)


FAST = ExecutionConfig(fast=True)
SPEEDS = (
    Speed("exact", ExecutionConfig(exact=True), torch.float32),
    Speed("standard", ExecutionConfig(), torch.float32),
    Speed("exact", ExecutionConfig(exact=True)),
    Speed("standard", ExecutionConfig()),
    Speed("fast: products in float8", FAST, products=True),
    Speed("fast: attention in 8 bits", FAST, attention=True),
    Speed("fast: both", FAST, products=True, attention=True),
    Speed("fast: attention in float8", FAST, flash=True),
    Speed("fast: all in float8", FAST, products=True, flash=True),
)


def speeds_of(names: Sequence[str]) -> list[Speed]:
    """Those of `SPEEDS` that belong to some of `config.SPEEDS`."""
    return [speed for speed in SPEEDS if speed.name.partition(":")[0] in names]


class SpeedResult(NamedTuple):
    """What a speed costs in error.

    median, largest: over the cases, of the latents' difference from the recorded ones, of their size in the 2-norm.
    worst: the case with the largest. seen: shares of what the bundled model's videos show as the prompt says; empty where
    none were made.
    """

    name: str
    dtype: str
    median: float
    largest: float
    worst: str
    seen: dict[str, float]

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.dtype


def measure(
    families: list[str],
    videos: int,
    device: str,
    say: Callable[[str], None] = print,
    speeds: Sequence[Speed] | None = None,
) -> Iterator[SpeedResult]:
    """Measure one speed after the other.

    videos: of the bundled model. speeds: all of `SPEEDS` where left out. Raises ValueError outside of the source repository.
    """
    cases = recorded(families)
    for speed in SPEEDS if speeds is None else speeds:
        name, dtype = speed.key
        say(f"{name}, {dtype}: {len(cases)} cases, {videos} videos")
        with speed.chosen():
            errors = {case.name: _error_of(case, speed, device) for case in cases}
            seen = _shown(speed, videos, device) if videos else {}
        worst = max(errors, key=lambda name: errors[name])
        yield SpeedResult(name, dtype, median(errors.values()), errors[worst], worst, seen)


def _error_of(case: Any, speed: Speed, device: str) -> float:
    expected = case.tensors["output"].float()
    made = case.run(dtype=speed.dtype, exact=speed.execution.exact, device=device, execution=speed.execution)
    return float((made.cpu().float() - expected).norm() / expected.norm())


def _shown(speed: Speed, videos: int, device: str) -> dict[str, float]:
    """What a viewer would see in videos of the bundled model, made from the same prompts and noise at every speed."""
    try:
        look = importlib.import_module("tools.train_tiny.measure")
    except ImportError as error:
        raise ValueError(
            f"the detector is part of the source repository only; {Path.cwd()} is none: {error}"
        ) from error
    plain = look.Tiny.load(BUNDLED)
    tiny = type(plain)(load_model(BUNDLED, dtype=speed.dtype, device=device), plain.text, plain.vae)
    scenes = look.scenes_for(videos, SEED)
    pairs = list(zip(scenes, look.watch(tiny, scenes, CHUNKS, execution=speed.execution)))
    return {
        "shape is there": mean(float(seen.present.float().mean()) for _, seen in pairs),
        "colour right": mean(name == scene.colour for scene, seen in pairs for name in seen.colour),
        "shape right": mean(name == scene.shape for scene, seen in pairs for name in seen.shape),
        "direction right": mean(
            look.direction(seen.position[: look.STRAIGHT_FRAMES]) == scene.direction for scene, seen in pairs
        ),
    }
