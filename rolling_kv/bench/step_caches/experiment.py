"""What the benchmark of the step caches measures: the run they all share, the candidates, and a result of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

import torch

from ...checkpoints.model import CausalModel
from ...config import CacheConfig, ExecutionConfig, SamplingConfig
from ...sampling.memory import estimate
from ...sampling.session import RollingSession
from ...step_cache import METHODS, StepCacheMethod, StepCacheReport, StepClock

MODES = ("multi-step", "bidirectional", "few-step")


@dataclass(frozen=True)
class StepCacheExperiment:
    """What all runs of the benchmark have in common.

    prompt, negative: embeddings; negative is read with guidance only
    mode: one of MODES
    height, width: of the videos, pixels
    chunks: length of each video; a bidirectional clip has as many frames at once
    seeds: one video each
    memory: whether to follow it where that takes a run of its own, which is everywhere but on CUDA
    execution: as `RollingSession` takes it
    """

    model: CausalModel
    prompt: torch.Tensor
    negative: torch.Tensor | None
    mode: str
    sampling: SamplingConfig
    cache: CacheConfig
    height: int
    width: int
    chunks: int
    seeds: tuple[int, ...] = (0,)
    memory: bool = True
    execution: ExecutionConfig = ExecutionConfig()

    @property
    def clip_frames(self) -> int:
        """Latent frames that are denoised at once."""
        return self.sampling.chunk * (self.chunks if self.mode == "bidirectional" else 1)


class Candidate(NamedTuple):
    """A step cache to measure.

    curve: the name of its curve, most often the method's title
    strength: what tells it from others on that curve
    method: None for a run without a step cache
    """

    curve: str
    strength: str
    method: StepCacheMethod | None


@dataclass
class StepCacheResult:
    """What was measured of one candidate. Lists are by seed; for the uncached runs, method is "none", strength empty.

    method, strength: see `Candidate`
    seconds: of the run
    plain_seconds: of an uncached run right before it, so that whatever else the machine does hits both
    report: over all seeds
    peak_bytes: most memory in use, weights included
    videos: latents [1, C, F, h, w] in model space, on the CPU, until `compare` has decoded them
    quality: against the uncached videos, means by the names of `Similarity`
    extra: what a `judge` said of the decoded videos, means
    """

    method: str
    strength: str
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    report: StepCacheReport | None = None
    peak_bytes: int | None = None
    videos: list[torch.Tensor] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def speed_up(self) -> float:
        """Median over the seeds."""
        return median(plain / taken for plain, taken in zip(self.plain_seconds, self.seconds))


def applicable(names: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """The methods to measure, of `METHODS`, and why others are left out. None: all that the diffusers here has.

    Raises ValueError for names that are unknown or, being asked for, cannot run.
    """
    why = {name: method.why_unavailable() for name, method in METHODS.items()}
    if names is None:
        return [name for name in METHODS if not why[name]], [f"{reason}." for reason in why.values() if reason]
    if not names or set(names) - set(METHODS):
        raise ValueError(f"step caches are named {', '.join(METHODS)}; got {', '.join(names) or 'none'}")
    if reasons := [why[name] for name in names if why[name]]:
        raise ValueError(f"{'; '.join(reasons)}: update it, or leave that step cache out")
    return [name for name in METHODS if name in names], []


def calibrated(names: Sequence[str]) -> list[str]:
    """Those of the methods that need constants of the model, and so cannot be measured in few-step sampling."""
    return [name for name in names if METHODS[name].calibration is not None]


def candidates(
    names: Sequence[str],
    guided: bool,
    *,
    defaults_only: bool = False,
    constants: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> list[Candidate]:
    """Every method of these names from gentle to strong, its defaults among them.

    guided: whether there is an unconditional branch
    defaults_only: each method with its default settings alone
    constants: of the methods that need some, by name
    """
    return [
        Candidate(method.title, strength, method.with_constants(constants.get(name, ())))
        for name in names
        for strength, method in METHODS[name].strengths(guided).items()
        if method.is_default or not defaults_only
    ]


def check(experiment: StepCacheExperiment, more: Sequence[Candidate] = ()) -> None:
    """Raise ValueError, before anything runs, for sizes, windows, prompts and further candidates that cannot work."""
    RollingSession(
        experiment.model, experiment.prompt, negative=experiment.negative if experiment.sampling.guided else None,
        height=experiment.height, width=experiment.width, sampling=experiment.sampling, cache=experiment.cache,
    )  # fmt: skip
    for method in filter(None, (candidate.method for candidate in more)):
        method.config(StepClock(lambda: 0.0, experiment.sampling.passes))


def bytes_needed(experiment: StepCacheExperiment, names: Sequence[str], more: Sequence[Candidate] = ()) -> int:
    """Rough bytes that the runs of `measure` take on the device beside the weights.

    That is caches, activations, and what the hungriest step cache holds.
    """
    transformer, sampling = experiment.model.transformer, experiment.sampling
    methods = [candidate.method for candidate in [*candidates(names, sampling.guided), *more]]
    # A whole clip is one chunk, without a rolling cache.
    at_once = replace(sampling, chunk=experiment.clip_frames)
    frames = sampling.frames_of(experiment.chunks)
    estimates = [
        estimate(
            transformer, experiment.height, experiment.width, sampling=at_once, cache=experiment.cache, frames=frames,
            step_cache=method,
        )
        for method in (None, *methods)
    ]  # fmt: skip
    hungriest = max(estimates, key=lambda needed: needed.device)
    if experiment.mode == "bidirectional":
        return hungriest.step_cache + hungriest.activations
    return hungriest.device
