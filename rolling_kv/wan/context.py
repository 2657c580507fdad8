"""What the processors read during one pass, and how every pass of an attachment is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cache.prompt import Branch
from ..config import ExecutionConfig


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    branch: the rolling cache that is written and read, and the prompt.
    time_rows: rows in which a single timestep is embedded.
    keys_only: whether the pass ends once the keys and values of the last block are written.
    """

    branch: Branch
    time_rows: int
    keys_only: bool


@dataclass
class PassContext:
    """Shared by an attachment and its processors; changed by the attachment alone.

    execution: how every pass is computed.
    detach: takes the attachment off.
    current: the pass under way, None between passes.
    rotation: of the positions of its chunk, as `rope.rotate` takes it.
    sinusoid: of its timestep, [channels], or of one timestep a frame, [f, channels].
    """

    execution: ExecutionConfig
    detach: Callable[[], None]
    current: Pass | None = None
    rotation: torch.Tensor | None = None
    sinusoid: torch.Tensor | None = None

    @property
    def running(self) -> Pass:
        """The pass under way: processors are called inside a pass only."""
        assert self.current is not None
        return self.current
