"""Every step cache at several strengths on one model, against no step cache: time, memory and quality."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from ..checkpoints.model import CausalModel
from ..config import CacheConfig, ExecutionConfig, SamplingConfig
from ..sampling.clip import BidirectionalClip
from ..sampling.memory import estimate
from ..sampling.session import RollingSession
from ..step_cache import (
    METHODS,
    FasterCache,
    FirstBlockCache,
    Forced,
    MagCache,
    MagCacheCalibration,
    PyramidAttentionBroadcast,
    SeaCache,
    StepCacheReport,
    TaylorSeer,
    why_unavailable,
)
from ..step_cache.methods import Run
from ..vae import WanVAE, to_raw
from .memory import CudaGauge, TensorBytes, storage_bytes
from .similarity import Similarity

MODES = ("multi-step", "bidirectional", "few-step")

OnPass = Callable[[int, int], None]
"""Called as on_pass(done, total) before every model pass, a guided pair counting as one; what it raises cancels."""

Named = tuple[str, str, object]
"""(name, strength, method) of one setting: the name of its curve, what tells it from others, a method of `METHODS`."""


@dataclass(frozen=True)
class Setting:
    """What every run shares. mode: one of MODES. chunks: of the video; a clip has as many frames at once.

    prompt, negative: embeddings; negative is read with guidance only. memory: follow it where that takes a run of its
    own, which is everywhere but on CUDA. execution: as `RollingSession` takes it.
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


@dataclass
class Measured:
    """One method at one strength. Lists are by seed; for the uncached runs, method is "none" and strength empty.

    seconds: of the run. plain_seconds: of an uncached run right before it, so that whatever else the machine does hits
    both. report: over all seeds. peak_bytes: most memory in use, weights included. videos: latents [1, C, F, h, w] in
    model space, on the CPU, until `compare` has decoded them. quality: against the uncached videos, means by the names of
    `Similarity`. extra: what a `judge` said of the decoded videos, means.
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
    why = {name: why_unavailable(method) for name, method in METHODS.items()}
    if names is None:
        return [name for name in METHODS if not why[name]], [f"{reason}." for reason in why.values() if reason]
    if not names or set(names) - set(METHODS):
        raise ValueError(f"step caches are named {', '.join(METHODS)}; got {', '.join(names) or 'none'}")
    if reasons := [why[name] for name in names if why[name]]:
        raise ValueError(f"{'; '.join(reasons)}: update it, or leave that step cache out")
    return [name for name in METHODS if name in names], []


def variants(ratios: tuple[float, ...], guided: bool = True) -> Iterator[tuple[str, object]]:
    """Every method from gentle to strong, its defaults among them: (strength, method). ratios: MagCache's constants."""
    wide = (100, 950)
    yield "self 2", PyramidAttentionBroadcast()
    yield "self 2, cross 6", PyramidAttentionBroadcast(2, 6)
    yield "self 4, cross 6, to 950", PyramidAttentionBroadcast(4, 6, wide, wide)
    if guided:
        yield "uncond 2, to 641", FasterCache(2)
        yield "uncond 5, to 641", FasterCache()
        yield "uncond 5, to 950", FasterCache(5, 2, (-1, 950), (-1, 950))
    else:  # there is no unconditional branch to leave out
        yield "self 2, to 681", FasterCache()
        yield "self 2, to 950", FasterCache(spatial_attention_timestep_skip_range=(-1, 950))
    for threshold in (0.05, 0.1, 0.2):
        yield f"threshold {threshold}", FirstBlockCache(threshold)
    yield "every 3", TaylorSeer(3)
    yield "every 5", TaylorSeer()
    yield "every 5, lite", TaylorSeer(use_lite_mode=True)
    if ratios:
        for threshold, steps in ((0.06, 3), (0.12, 4), (0.24, 6)):
            yield f"threshold {threshold}, {steps} in a row", MagCache(threshold, steps, mag_ratios=ratios)
    for threshold in (0.1, 0.25, 0.5):
        yield f"threshold {threshold}", SeaCache(threshold)


def has_defaults(method) -> bool:
    """Whether the method has its default settings, MagCache's constants aside."""
    return method == (MagCache(mag_ratios=method.mag_ratios) if isinstance(method, MagCache) else type(method)())


def sample(
    setting: Setting, method, seed: int, on_pass: OnPass | None = None
) -> tuple[torch.Tensor, StepCacheReport | None]:
    """One video, [1, C, F, h, w] in model space on the CPU, and what the step cache did. Nothing stays attached."""
    shared = dict(
        negative=setting.negative if setting.sampling.guided else None, height=setting.height, width=setting.width,
        sampling=setting.sampling, step_cache=method, execution=setting.execution, on_pass=on_pass,
    )  # fmt: skip
    if setting.mode == "bidirectional":
        clip = BidirectionalClip(setting.model, setting.prompt, frames=setting.clip_frames, **shared)
        return clip.sample(seed).cpu(), clip.step_report
    session = RollingSession(setting.model, setting.prompt, cache=setting.cache, **shared)
    with session:
        for _ in session.generate(setting.chunks, seed=seed):
            pass
    return session.state.latents().cpu(), session.step_report


def check(setting: Setting, more: Sequence[Named] = ()) -> None:
    """Raise ValueError, before anything runs, for sizes, windows, prompts and further settings that cannot work."""
    RollingSession(
        setting.model, setting.prompt, negative=setting.negative if setting.sampling.guided else None,
        height=setting.height, width=setting.width, sampling=setting.sampling, cache=setting.cache,
    )  # fmt: skip
    for _, _, method in more:
        method.config(Run(lambda: 0.0, setting.sampling.passes_at(1)))


def bytes_needed(setting: Setting, names: Sequence[str], more: Sequence[Named] = ()) -> int:
    """Rough bytes that the runs of `measure` take on the device beside the weights: caches, activations, and what the
    hungriest step cache holds."""
    transformer, sampling = setting.model.transformer, setting.sampling
    methods = [method for _, method in variants((1.0,), sampling.guided) if method.name in names]
    methods += [method for _, _, method in more]
    # A whole clip is one chunk, without a rolling cache.
    at_once = replace(sampling, chunk=setting.clip_frames)
    frames = sum(sampling.chunk_sizes(setting.chunks))
    estimates = [
        estimate(
            transformer, setting.height, setting.width, sampling=at_once, cache=setting.cache, frames=frames,
            step_cache=method,
        )
        for method in (None, *methods)
    ]  # fmt: skip
    hungriest = max(estimates, key=lambda needed: needed.device)
    if setting.mode == "bidirectional":
        return hungriest.step_cache + hungriest.activations
    return hungriest.device


def measure(
    setting: Setting,
    names: Sequence[str],
    *,
    defaults_only: bool = False,
    more: Sequence[Named] = (),
    on_run: Callable[[int, int, str], None] = lambda *_: None,
    on_pass: OnPass = lambda *_: None,
) -> tuple[list[Measured], tuple[float, ...]]:
    """Time the methods of these names (see `applicable`). Returns the results, the first without a step cache, and
    MagCache's constants, empty unless it is among them.

    defaults_only: each method with its default settings alone. more: further settings. on_run: called as (done, total,
    what) before the runs of each setting. on_pass: over all runs together. An exception from either cancels, and leaves
    the model as it was.
    """
    calibrated = "magcache" in names and setting.mode != "few-step"

    def plan(ratios: tuple[float, ...]) -> list[Named]:
        chosen = [
            (method.title, strength, method)
            for strength, method in variants(ratios, setting.sampling.guided)
            if method.name in names and (has_defaults(method) or not defaults_only)
        ]
        return [("none", "", None), *chosen, *more]

    count = len(plan((1.0,) if calibrated else ()))
    device = setting.model.compute_device()
    cuda = device.type == "cuda"
    separate = setting.memory and not cuda
    progress = _Progress(1 + (2 * count - 1) * len(setting.seeds) + separate * count, on_pass)

    def run(method, seed: int) -> tuple[torch.Tensor, StepCacheReport | None]:
        made = sample(setting, method, seed, progress)
        progress.video += 1
        return made

    def warm_up(method) -> None:
        """One chunk, untimed: what a method sets up on its first use is no part of its price."""
        sample(replace(setting, chunks=1), method, max(setting.seeds) + 1, progress.wait)

    # The first run is not measured either, and calibrates.
    _, report = run(MagCacheCalibration() if calibrated else None, max(setting.seeds) + 1)
    ratios = report.mag_ratios if calibrated else ()
    results = []
    for index, (title, strength, method) in enumerate(plan(ratios)):
        on_run(index, count, f"{title} {strength}".strip())
        if setting.mode == "few-step" and method is not None:
            method = Forced(method)
        result = Measured(title, strength)
        if method is not None and title not in {earlier.method for earlier in results}:
            warm_up(method)
        for seed in setting.seeds:
            start = time.perf_counter()
            if method is not None:
                run(None, seed)
            middle = time.perf_counter()
            gauge = CudaGauge(device, _weights(setting)) if cuda else None
            with gauge.turn(title) if gauge else nullcontext():
                latents, report = run(method, seed)
            result.seconds.append(time.perf_counter() - middle)
            result.report = report.plus(result.report) if result.report else report
            result.plain_seconds.append(middle - start if method is not None else result.seconds[-1])
            result.videos.append(latents)
            result.peak_bytes = max(gauge.peaks[title], result.peak_bytes or 0) if gauge else None
        if separate:
            with TensorBytes(_weights(setting)) as counted:
                run(method, setting.seeds[0])
            result.peak_bytes = counted.peak
        results.append(result)
    return results, ratios


def compare(
    results: Sequence[Measured],
    decode: Callable[[torch.Tensor], torch.Tensor],
    similarity: Similarity,
    *,
    judge: Callable[[torch.Tensor], dict[str, float]] | None = None,
) -> None:
    """Fill in quality and extra of what `measure` gave, and let go of the videos.

    decode: latents [1, C, F, h, w] in model space to frames [3, T, H, W] in [-1, 1] on the CPU. judge: looks at each
    decoded video.
    """
    scores: list[list[dict[str, float]]] = [[] for _ in results]
    extras: list[list[dict[str, float]]] = [[] for _ in results]
    for seed in range(len(results[0].videos)):
        original = decode(results[0].videos[seed])
        for index, result in enumerate(results):
            frames = decode(result.videos[seed]) if index else original
            if index:
                scores[index].append(similarity(frames, original))
            extras[index].append(judge(frames) if judge else {})
    for result, score, extra in zip(results, scores, extras):
        result.quality, result.extra = _mean(score), _mean(extra)
        result.videos.clear()


def step_change(setting: Setting, on_pass: OnPass | None = None) -> tuple[float, ...]:
    """Relative change of the predicted flow from step to step in few-step sampling: one per step after the first."""
    return sample(replace(setting, mode="multi-step"), FirstBlockCache(), setting.seeds[0], on_pass)[1].change


def decode_video(vae: WanVAE, latents: torch.Tensor, on_frame: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Frames [3, T, H, W] in [-1, 1] on the CPU of one video's latents in model space; on_frame: after each of them."""
    frames = []
    with torch.inference_mode():
        for few in vae.decoder().decode_frames(to_raw(latents.float())):
            frames.append(few[0].float().clamp(-1, 1).cpu())
            on_frame()
    return torch.cat(frames, dim=1)


class _Progress:
    """Turns the passes of each video into those of all."""

    def __init__(self, videos: int, on_pass: OnPass):
        self.video, self.videos, self.on_pass = 0, videos, on_pass
        self._total = 0

    def __call__(self, done: int, total: int) -> None:
        self._total = total
        self.on_pass(self.video * total + done, self.videos * total)

    def wait(self, *_) -> None:
        """A pass that does not count."""
        self.on_pass(self.video * self._total, self.videos * self._total)


def _weights(setting: Setting) -> int:
    return storage_bytes([*setting.model.parameters(), *setting.model.buffers()])


def _mean(scores: list[dict[str, float]]) -> dict[str, float]:
    """By name. PSNR is that of all videos together, whose squared errors are averaged: one equal video is no infinity."""
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]} if scores else {}
    if "psnr" in means:
        error = sum(10 ** (-score["psnr"] / 10) for score in scores) / len(scores)
        means["psnr"] = -10 * math.log10(error) if error else math.inf
    return means
