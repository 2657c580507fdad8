"""What skipping steps would cost: the change from step to step, measured on the uncached run."""

from __future__ import annotations

from statistics import median

import torch

from .method import Pass, StepCacheMethod
from .report import StepCacheReport


class StepProbe:
    """Stands where a `StepCache` would, skips nothing, and measures how much the predicted flow changes per step.

    A skipped step would put about that error into the video.
    """

    def __init__(self, method: StepCacheMethod, steps: int):
        self.method = method
        self.steps = steps
        self._previous: torch.Tensor | None = None
        self._changes: list[torch.Tensor] = []

    def begin(self) -> None:
        self._previous = None

    def predict(self, x: torch.Tensor, timestep: float, passes: list[Pass]) -> list[torch.Tensor]:
        flows = [branch(x, timestep) for branch in passes]
        flow, previous = flows[0].float(), self._previous
        if previous is not None:
            self._changes.append((flow - previous).abs().mean() / previous.abs().mean())
        self._previous = flow
        return flows

    def report(self) -> StepCacheReport:
        change = tuple(float(value) for value in self._changes)
        middle = f"by {100 * median(change):.0f} % (median of this run)" if change else "too much"
        note = (
            f"{self.method.title} was not used: this model makes a chunk in {self.steps} steps, and there is nothing "
            f"to skip. From one step to the next its prediction changes {middle}, and a skipped step would put that "
            "error into the video. Step caches are for multi-step sampling."
        )
        return StepCacheReport(self.method.title, {}, {}, change=change, note=note)

    def detach(self) -> None:
        self._previous = None
