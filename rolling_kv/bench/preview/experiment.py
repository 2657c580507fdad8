"""What is measured: chunks made alone, and chunks whose pictures are made as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...checkpoints.model import CausalModel
from ...previews import LinearPreview
from ...sampling.session import RollingSession
from ...sampling.state import CacheState
from ..subject import Subject

PREVIEW_SIZE = 256
"""Most pixels along the longer side of a picture: what pages ask for unless told otherwise."""

Pictures = Callable[[CacheState, int], Tensor]
"""Makes uint8 [T, H, W, 3] of a state's latent frames from a number on."""


@dataclass(frozen=True, kw_only=True)
class PreviewExperiment(Subject):
    """preview: the linear map of the model's latents."""

    preview: LinearPreview

    def session(self, model: CausalModel) -> RollingSession:
        return RollingSession(model, self.prompt, height=self.height, width=self.width)

    def ways(self) -> dict[str, Pictures | None]:
        """How the pictures of a chunk are made, by name; the first is what the others are compared with."""
        assert len(self._noise)  # made before anything is measured
        return {"none": None, "linear": self._linear, "frames": self._frames}

    def _linear(self, state: CacheState, first: int) -> Tensor:
        return self.preview.pictures(state.frames_between, first, state.frames)

    def _frames(self, state: CacheState, first: int) -> Tensor:
        """As of a video that is decoded anyway."""
        pixels = self.model.geometry.pixel_frames
        return self._noise[: pixels(state.frames) - pixels(first)]

    @cached_property
    def _noise(self) -> Tensor:
        """Frames of a chunk, which are the hardest to encode."""
        shape = self.model.geometry.temporal * self.model.preset.sampling.chunk, self.height, self.width, 3
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.uint8)
