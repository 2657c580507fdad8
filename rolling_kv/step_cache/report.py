"""What a step cache says of a run."""

from __future__ import annotations

from typing import NamedTuple


class StepCacheReport(NamedTuple):
    """What a step cache did, or why it did nothing.

    method: the title of the method
    computed, possible: calls per part of the blocks ("self-attention", "cross-attention", "feed-forward"); empty where
        the cache was not attached
    nbytes: most bytes that it held
    change: relative change of the predicted flow from step to step, of each step; only where the cache was not attached
    constants: what a calibration measured, one value per step, the mean over the chunks
    note: for people, or empty
    """

    method: str
    computed: dict[str, int]
    possible: dict[str, int]
    nbytes: int = 0
    change: tuple[float, ...] = ()
    constants: tuple[float, ...] = ()
    note: str = ""

    def skipped(self, part: str | None = None) -> float:
        """Share of the calls that were left out, 0 to 1, of one part or over all of them."""
        parts = [part] if part else list(self.possible)
        possible = sum(self.possible[part] for part in parts)
        return 1 - sum(self.computed[part] for part in parts) / possible if possible else 0.0

    def plus(self, other: StepCacheReport) -> StepCacheReport:
        """Of two runs with one method: calls add up, bytes are the most of either. The rest stays as it is here."""
        return self._replace(
            computed={part: calls + other.computed[part] for part, calls in self.computed.items()},
            possible={part: calls + other.possible[part] for part, calls in self.possible.items()},
            nbytes=max(self.nbytes, other.nbytes),
        )

    def summary(self) -> str:
        """A sentence for people."""
        shares = ", ".join(f"{self.skipped(part):.0%} of {part}" for part in self.possible)
        return self.note or f"{self.method} left out {shares}, and held {self.nbytes / 2**20:.1f} MiB."
