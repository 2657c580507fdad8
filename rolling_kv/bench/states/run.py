"""Make the same video in every way in turn, chunk by chunk, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...cache.sizes import CacheShape
from ...sampling.state import CacheState
from ...sampling.state_file import load_state, save_state
from ...sampling.workspace import Workspace
from ..figures import BenchError
from ..gauges import now
from ..subject import beside
from .experiment import WAYS, StateExperiment, Way

Say = Callable[[str], None]

ASKED = (480, 832)
"""Height and width of a video in pixels whose state's bytes are told too."""


@dataclass
class WayResult:
    """seconds: of each whole video, and so cpu_seconds: of this process on all processors. passes: of one video."""

    way: Way
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    passes: int = 0


@dataclass
class ForkResult:
    """Seconds of two branches that continue a video from its middle, the first of which takes over the working cache."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)


@dataclass
class FileResult:
    """A state as a file. frames: latent frames. nbytes: of the latents, and of the prompts.

    cache_frame_bytes: that keys and values of one latent frame would take, which no file holds.
    """

    height: int
    width: int
    frames: int
    latent_bytes: int
    prompt_bytes: int
    cache_frame_bytes: int
    file_bytes: int = 0
    save_seconds: list[float] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)


@dataclass
class Results:
    ways: list[WayResult]
    fork: ForkResult
    files: list[FileResult]


def measure(experiment: StateExperiment, *, say: Say = print) -> Results:
    """Make the video in every way, fork it, and put it away.

    Raises BenchError unless every way, and a branch of the fork that is made as the video was, give the video's bits.
    """
    models = [beside(experiment.model) for _ in WAYS]
    if experiment.device.type == "cuda":  # what is set up once is not what is measured
        for way, model in zip(WAYS, models):
            list(way.video(experiment, model))
    ways = [WayResult(way, passes=_passes(experiment, way)) for way in WAYS]
    fork = ForkResult()
    for number in range(experiment.repeats):
        state = _take_turns(experiment, ways, models, number)
        _fork(experiment, state, fork)
        say(f"video {number + 1} of {experiment.repeats}")
    sizes = dict.fromkeys(((experiment.height, experiment.width), ASKED))
    files = [_put_away(experiment, state if size != ASKED else None, *size) for size in sizes]
    return Results(ways, fork, files)


def _take_turns(experiment: StateExperiment, ways: list[WayResult], models, number: int) -> CacheState:
    videos = [result.way.video(experiment, model) for result, model in zip(ways, models)]
    states: list[CacheState] = [CacheState()] * len(ways)
    seconds, cpu_seconds = [0.0] * len(ways), [0.0] * len(ways)
    for chunk in range(experiment.chunks):
        for turn in range(len(ways)):
            index = (turn + chunk + number) % len(ways)  # nobody is always the one after the longest
            start, cpu_start = now(experiment.device), time.process_time()
            states[index] = next(videos[index])
            seconds[index] += now(experiment.device) - start
            cpu_seconds[index] += time.process_time() - cpu_start
    for index, (result, state) in enumerate(zip(ways, states)):
        _check_same(states[0], state, result.way.title)
        result.seconds.append(seconds[index])
        result.cpu_seconds.append(cpu_seconds[index])
    return states[0]


def _fork(experiment: StateExperiment, state: CacheState, result: ForkResult) -> None:
    """Two branches from the video's middle. The second one goes on as the video did."""
    workspace, rest = Workspace(), experiment.chunks - experiment.half
    with experiment.session(experiment.model, None, workspace) as session:
        list(session.generate(experiment.half, seed=experiment.seed))
    middle = session.state
    for seconds, seed in ((result.first, experiment.seed + 1), (result.second, experiment.seed)):
        start = now(experiment.device)
        with experiment.session(experiment.model, middle, workspace) as session:
            list(session.generate(rest, seed=seed))
        seconds.append(now(experiment.device) - start)
    _check_same(state, session.state, "the fork's second branch")


def _passes(experiment: StateExperiment, way: Way) -> int:
    """Passes of one video, as sessions count them."""
    past, passes = 0, experiment.model.preset.sampling.passes_for(experiment.chunks)
    for length in experiment.lengths(experiment.runs if way.chained else 1):
        passes += 0 if way.takes_over or way.carries else max(past - 1, 0)
        past += length
    return passes


def _put_away(experiment: StateExperiment, state: CacheState | None, height: int, width: int) -> FileResult:
    """Save and load a state. state: the video; None for one as long, of that size, with latents of noise."""
    model, frames = experiment.model, experiment.model.preset.sampling.frames_of(experiment.chunks)
    latent_size = model.geometry.latent_size(height, width)
    if state is None:
        state = CacheState(model=model.identity)
        for size in model.preset.sampling.chunk_sizes(experiment.chunks):
            chunk = torch.randn(1, model.geometry.channels, size, *latent_size).to(model.dtype)
            prompt = experiment.prompt.to("cpu", model.dtype)
            state = state.extended(chunk, timestep=0.0, prompt=prompt, negative=None, seed=experiment.seed)
    shape = CacheShape.of(model.transformer, 1, *latent_size, model.dtype)
    chunks, prompts = (sum(tensor.nbytes for tensor in tensors) for tensors in (state.chunks, state.prompts))
    result = FileResult(height, width, frames, chunks, prompts, shape.bytes_per_frame())
    with tempfile.TemporaryDirectory() as folder:
        for number in range(experiment.repeats):
            start = now(experiment.device)
            path = save_state(state, Path(folder) / f"{number}.safetensors")
            saved = now(experiment.device)
            loaded = load_state(path, model)
            result.load_seconds.append(now(experiment.device) - saved)
            result.save_seconds.append(saved - start)
            result.file_bytes = path.stat().st_size
            _check_same(state, loaded, "the state from a file")
    return result


def _check_same(expected: CacheState, made: CacheState, name: str) -> None:
    if made.key != expected.key:
        raise BenchError(f"{name} is not the video that one run makes")
