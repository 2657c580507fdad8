"""The same videos one by one and together, in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...checkpoints.model import CausalModel
from ...sampling.session import RollingSession
from ...sampling.together import Together
from ..gauges import now
from ..random_model import random_prompt


class StreamsExperiment(NamedTuple):
    """What to measure.

    model: that makes all videos. height, width: pixels. chunks: of each video. counts: of videos. repeats: timed turns.
    """

    model: CausalModel
    height: int
    width: int
    chunks: int
    counts: tuple[int, ...]
    repeats: int

    def prompt(self, number: int) -> torch.Tensor:
        return random_prompt(self.model.dtype, self.model.compute_device(), number)


class Measured(NamedTuple):
    """Of one count of videos. apart, together: seconds for all of them, the best turn. held: bytes of keys and values.

    error: largest difference of the latents, as a part of their largest value.
    """

    count: int
    apart: float
    together: float
    held: int
    error: float


def measure(experiment: StreamsExperiment, say: Callable[[str], None]) -> list[Measured]:
    """Time each count of videos, both ways in turns."""
    results = []
    for count in experiment.counts:
        times: list[tuple[float, float]] = []
        held, error = 0, 0.0
        for turn in range(experiment.repeats):
            begin = now(experiment.model.compute_device())
            apart = [_one(experiment, number) for number in range(count)]
            between = now(experiment.model.compute_device())
            together, held = _together(experiment, count)
            times.append((between - begin, now(experiment.model.compute_device()) - between))
            pairs = list(zip(apart, together))
            error = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
            say(f"{count} videos, turn {turn + 1} of {experiment.repeats}")
        apart_best, together_best = min(turn[0] for turn in times), min(turn[1] for turn in times)
        results.append(Measured(count, apart_best, together_best, held, error))
    return results


def _one(experiment: StreamsExperiment, number: int) -> torch.Tensor:
    session = RollingSession(
        experiment.model, experiment.prompt(number), height=experiment.height, width=experiment.width
    )
    with session:
        for _ in session.generate(experiment.chunks, number):
            pass
    return session.state.latents().float()


def _together(experiment: StreamsExperiment, count: int) -> tuple[list[torch.Tensor], int]:
    size, held = {"height": experiment.height, "width": experiment.width}, 0
    with Together(experiment.model) as together:
        streams = [
            together.join(experiment.prompt(number), experiment.chunks, number, **size) for number in range(count)
        ]
        for _ in together.chunks():
            held = max(held, sum(sum(stream.session.cache_bytes) for stream in streams))
    if failed := next((stream.error for stream in streams if stream.error), None):
        raise failed
    return [stream.state.latents().float() for stream in streams], held
