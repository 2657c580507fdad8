"""Run the candidates of the benchmark of the step caches: time, memory, and how alike the videos are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from ...sampling.clip import BidirectionalClip
from ...sampling.session import RollingSession
from ...step_cache import METHODS, FirstBlockCache, Forced, StepCacheReport
from ...vae.latents import to_raw
from ...vae.loading import AnyVAE
from ..gauges import CudaGauge, TensorBytes, storage_bytes
from .experiment import Candidate, StepCacheExperiment, StepCacheResult, calibrated, candidates
from .similarity import Similarity

OnPass = Callable[[int, int], None]
"""Called as on_pass(done, total) before every model pass, a guided pair counting as one; what it raises cancels."""


def sample(
    experiment: StepCacheExperiment, method, seed: int, on_pass: OnPass | None = None
) -> tuple[torch.Tensor, StepCacheReport | None]:
    """One video, [1, C, F, h, w] in model space on the CPU, and what the step cache did. Nothing stays attached."""
    arguments: dict[str, Any] = dict(
        negative=experiment.negative if experiment.sampling.guided else None, height=experiment.height,
        width=experiment.width, sampling=experiment.sampling, step_cache=method, execution=experiment.execution,
        on_pass=on_pass,
    )  # fmt: skip
    if experiment.mode == "bidirectional":
        clip = BidirectionalClip(experiment.model, experiment.prompt, frames=experiment.clip_frames, **arguments)
        return clip.sample(seed).cpu(), clip.step_report
    session = RollingSession(experiment.model, experiment.prompt, cache=experiment.cache, **arguments)
    with session:
        for _ in session.generate(experiment.chunks, seed=seed):
            pass
    return session.state.latents().cpu(), session.step_report


def measure(
    experiment: StepCacheExperiment,
    names: Sequence[str],
    *,
    defaults_only: bool = False,
    more: Sequence[Candidate] = (),
    on_run: Callable[[int, int, str], None] = lambda *_: None,
    on_pass: OnPass = lambda *_: None,
) -> tuple[list[StepCacheResult], dict[str, tuple[float, ...]]]:
    """Time step caches; the uncached run comes first, and again before each of the others.

    names: of the methods, see `experiment.applicable`; those that need constants are calibrated, and left out in few-step sampling
    defaults_only: each method with its default settings alone
    more: further candidates
    on_run: called as (done, total, what) before the runs of each candidate
    on_pass: called over all runs together

    Returns the results, the first without a step cache, and the constants that were measured, by the method's name. An
    exception from on_run or on_pass cancels, and leaves the model as it was.
    """
    if experiment.mode == "few-step":
        names = [name for name in names if name not in calibrated(names)]

    def plan(constants: dict[str, tuple[float, ...]]) -> list[Candidate]:
        chosen = candidates(names, experiment.sampling.guided, defaults_only=defaults_only, constants=constants)
        return [Candidate("none", "", None), *chosen, *more]

    count = len(plan({}))
    first_runs = calibrated(names) or [None]
    device = experiment.model.compute_device()
    cuda = device.type == "cuda"
    separate = experiment.memory and not cuda
    progress = _Progress(len(first_runs) + (2 * count - 1) * len(experiment.seeds) + separate * count, on_pass)

    def run(method, seed: int) -> tuple[torch.Tensor, StepCacheReport | None]:
        made = sample(experiment, method, seed, progress)
        progress.video += 1
        return made

    def warm_up(method) -> None:
        """One chunk, untimed: what a method sets up on its first use is no part of its price."""
        sample(replace(experiment, chunks=1), method, max(experiment.seeds) + 1, progress.wait)

    constants = {}
    for name in first_runs:  # one at least: the very first run is not measured
        calibration = METHODS[name].calibration if name else None
        _, report = run(calibration and calibration(), max(experiment.seeds) + 1)
        if name and report:
            constants[name] = report.constants
    results = []
    for index, (title, strength, method) in enumerate(plan(constants)):
        on_run(index, count, f"{title} {strength}".strip())
        if experiment.mode == "few-step" and method is not None:
            method = Forced(method)
        result = StepCacheResult(title, strength)
        if method is not None and title not in {earlier.method for earlier in results}:
            warm_up(method)
        for seed in experiment.seeds:
            start = time.perf_counter()
            if method is not None:
                run(None, seed)
            middle = time.perf_counter()
            gauge = CudaGauge(device, _weights(experiment)) if cuda else None
            with gauge.turn(title) if gauge else nullcontext():
                latents, report = run(method, seed)
            result.seconds.append(time.perf_counter() - middle)
            result.report = report.plus(result.report) if report and result.report else report
            result.plain_seconds.append(middle - start if method is not None else result.seconds[-1])
            result.videos.append(latents)
            result.peak_bytes = max(gauge.peaks[title], result.peak_bytes or 0) if gauge else None
        if separate:
            with TensorBytes(_weights(experiment)) as counted:
                run(method, experiment.seeds[0])
            result.peak_bytes = counted.peak
        results.append(result)
    return results, constants


def compare(
    results: Sequence[StepCacheResult],
    decode: Callable[[torch.Tensor], torch.Tensor],
    similarity: Similarity,
    *,
    judge: Callable[[torch.Tensor], dict[str, float]] | None = None,
) -> None:
    """Fill in quality and extra of what `measure` gave, and let go of the videos.

    results: what is filled in; the first is the uncached one
    decode: latents [1, C, F, h, w] in model space to frames [3, T, H, W] in [-1, 1] on the CPU
    similarity: compares such frames
    judge: looks at the frames of each video
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


def step_change(experiment: StepCacheExperiment, on_pass: OnPass | None = None) -> tuple[float, ...]:
    """Relative change of the predicted flow from step to step in few-step sampling: one per step after the first."""
    _, report = sample(replace(experiment, mode="multi-step"), FirstBlockCache(), experiment.seeds[0], on_pass)
    return report.change if report else ()


def decode_video(vae: AnyVAE, latents: torch.Tensor, on_frame: Callable[[], None] = lambda: None) -> torch.Tensor:
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


def _weights(experiment: StepCacheExperiment) -> int:
    return storage_bytes([*experiment.model.parameters(), *experiment.model.buffers()])


def _mean(scores: list[dict[str, float]]) -> dict[str, float]:
    """By name. PSNR is that of all videos together, whose squared errors are averaged: one equal video is no infinity."""
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]} if scores else {}
    if "psnr" in means:
        error = sum(10 ** (-score["psnr"] / 10) for score in scores) / len(scores)
        means["psnr"] = -10 * math.log10(error) if error else math.inf
    return means
