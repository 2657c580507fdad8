"""Make the same video with and without pictures in turn, chunk by chunk, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from queue import Queue

from ...checkpoints.model import CausalModel
from ...strips import Strip, StripThread, make_strip
from ..figures import BenchError
from ..gauges import now
from ..subject import beside
from .experiment import PREVIEW_SIZE, Pictures, PreviewExperiment


@dataclass
class PreviewResult:
    """seconds: of each whole video, and so cpu_seconds: of this process on all processors. strip_bytes: of each picture file."""

    way: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    strip_bytes: list[int] = field(default_factory=list)


def measure(experiment: PreviewExperiment, *, say: Callable[[str], None] = print) -> list[PreviewResult]:
    """Make the videos. Every picture is waited for, so that none of its cost falls on another way's turn.

    Beside a GPU, or with a processor to spare, the thread that makes them takes less of the sampling's time than that.
    """
    ways = experiment.ways()
    models = [beside(experiment.model) for _ in ways]
    results = [PreviewResult(way) for way in ways]
    for number in range(experiment.repeats):
        videos = [_video(experiment, model, *way) for model, way in zip(models, zip(ways.values(), results))]
        seconds, cpu_seconds = [0.0] * len(ways), [0.0] * len(ways)
        for chunk in range(experiment.chunks):
            for turn in range(len(ways)):
                index = (turn + chunk + number) % len(ways)  # nobody is always the one after the longest
                start, cpu_start = now(experiment.device), time.process_time()
                next(videos[index])
                seconds[index] += now(experiment.device) - start
                cpu_seconds[index] += time.process_time() - cpu_start
        for video, result, wall, cpu in zip(videos, results, seconds, cpu_seconds):
            video.close()
            result.seconds.append(wall)
            result.cpu_seconds.append(cpu)
        say(f"video {number + 1} of {experiment.repeats}")
    return results


def _video(
    experiment: PreviewExperiment, model: CausalModel, pictures: Pictures | None, result: PreviewResult
) -> Generator[None, None, None]:
    """Yields after each chunk, whose pictures are there then."""
    told: Queue[Strip | None] = Queue()
    thread = StripThread(lambda chunk, strip: told.put(strip))
    try:
        with experiment.session(model) as session:
            for chunk in session.generate(experiment.chunks, seed=experiment.seed):
                if pictures is not None:
                    state, first = session.state, chunk.start_frame
                    thread.put(1, lambda: make_strip(pictures(state, first), 0.0, PREVIEW_SIZE))  # noqa: B023 - waited for
                    strip = told.get()
                    if strip is None:
                        raise BenchError("a picture could not be made")
                    result.strip_bytes.append(len(strip.data))
                yield
    finally:
        thread.close()
