"""What is measured: one video, made in one run and in several that continue each other's states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...checkpoints.model import CausalModel
from ...config import check_whole
from ...sampling.session import RollingSession
from ...sampling.state import CacheState
from ...sampling.workspace import Workspace
from ..subject import Subject


@dataclass(frozen=True, kw_only=True)
class StateExperiment(Subject):
    """runs: in how many a chain makes the video.

    Raises ValueError as `Subject` does, and for more runs than chunks.
    """

    runs: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_whole("the number of runs", self.runs, 2, self.chunks)

    @property
    def half(self) -> int:
        """Chunks of the video at which it forks."""
        return self.chunks // 2

    def lengths(self, runs: int) -> list[int]:
        """Chunks of each of so many runs."""
        return [self.chunks * (number + 1) // runs - self.chunks * number // runs for number in range(runs)]

    def session(
        self,
        model: CausalModel,
        state: CacheState | None = None,
        workspace: Workspace | None = None,
        keep_keys: bool = False,
    ) -> RollingSession:
        """A run that continues a state."""
        return RollingSession(
            model, self.prompt, height=self.height, width=self.width, state=state, workspace=workspace, keep_keys=keep_keys
        )  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to the same video.

    takes_over: whether a run takes over the working cache of the one before it. carries: whether states carry their keys.
    """

    title: str
    chained: bool = False
    takes_over: bool = False
    carries: bool = False

    def video(self, experiment: StateExperiment, model: CausalModel) -> Iterator[CacheState]:
        """The video's state after each chunk; all that a run costs lies between its first chunk and that of the next run."""
        workspace, state = Workspace() if self.takes_over else None, None
        for length in experiment.lengths(experiment.runs if self.chained else 1):
            with experiment.session(model, state, workspace, self.carries) as session:
                made = session.generate(length, seed=experiment.seed)
                for _ in range(length - 1):
                    next(made)
                    yield session.state
                next(made)
            state = session.state
            yield state


WAYS = (
    Way("one run"),
    Way("chain, taken over", True, takes_over=True),
    Way("chain, keys in the state", True, carries=True),
    Way("chain, replayed", True),
)
"""The first is what the others are compared with."""
