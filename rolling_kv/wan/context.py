"""What the processors read during one pass, and how every pass of an attachment is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..cache.prompt import Branch
from ..config import ExecutionConfig
from .borrowed import Rotate
from .shards import HeadShards


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    branches: the rolling cache that is written and read, and the prompt; one for each of the videos that pass together.
    time_rows: rows in which a single timestep is embedded.
    keys_only: whether the pass ends once the keys and values of the last block are written.
    """

    branches: tuple[Branch, ...]
    time_rows: int
    keys_only: bool

    @property
    def branch(self) -> Branch:
        """The only one, or the first."""
        return self.branches[0]

    def apart(self, *batches: torch.Tensor) -> Iterator[tuple[Branch, tuple[torch.Tensor, ...]]]:
        """Each branch with its videos of some batches [B, ...]."""
        if len(self.branches) == 1:
            return iter([(self.branch, batches)])
        sizes = [branch.cache.shape.batch for branch in self.branches]
        return zip(self.branches, zip(*(batch.split(sizes) for batch in batches)))


@dataclass
class PassContext:
    """Shared by an attachment and its processors; changed by the attachment alone.

    execution: how every pass is computed.
    detach: takes the attachment off.
    kernels: the module `kernels`, where passes in half precision use it.
    shards: the processes that share the passes; None where this one makes them alone.
    current: the pass under way, None between passes.
    rotation: of the positions of its chunk, as `rope.rotate` takes it, or `rotate`.
    rotate: another package's function in the place of that, see `borrowed`; None without.
    sinusoid: of its timestep, [channels], or of one timestep a frame, [f, channels].
    slots: where it writes in the cache, see `RollingKVCache.slots`; None where the CPU tells.
    """

    execution: ExecutionConfig
    detach: Callable[[], None]
    shards: HeadShards | None = None
    kernels: Any = None
    current: Pass | None = None
    rotation: torch.Tensor | None = None
    rotate: Rotate | None = None
    sinusoid: torch.Tensor | None = None
    slots: torch.Tensor | None = None

    @property
    def running(self) -> Pass:
        """The pass under way: processors are called inside a pass only."""
        assert self.current is not None
        return self.current

    @property
    def frames(self) -> int:
        """Latent frames of the pass under way."""
        return self.running.branch.cache.window.open
