"""What a pass takes beside latents: the rotation of its positions and the sinusoid of its timestep."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import ExecutionConfig
from ..devices import to_device
from ..geometry import Geometry
from ..platforms import exact_convolutions
from ..rope import rotary_rotations
from .context import PassContext


class PassInputs:
    """Makes both on the CPU in float64, and keeps what later passes will ask for again."""

    def __init__(self, transformer, execution: ExecutionConfig):
        self.transformer = transformer
        self.execution = execution
        self.together = 1  # videos that pass as one batch, each at a position of its own
        self._rotations: dict[tuple, torch.Tensor] = {}
        self._sinusoids: dict[tuple, torch.Tensor] = {}

    def rotation(self, start_frame: float, latents: torch.Tensor) -> torch.Tensor:
        """The rotation for latents [B, C, f, h, w] that begin at an absolute latent frame, as `rope.rotate` takes it."""
        frames, height, width = latents.shape[2:]
        grid = (frames, *Geometry.of(self.transformer).grid(height, width))
        key = (start_frame, *grid, latents.device)
        if key not in self._rotations:
            # Every step of a chunk uses the same one; another chunk's will not be needed again.
            while len(self._rotations) >= self.together:
                del self._rotations[next(iter(self._rotations))]
            dtype = torch.complex128 if self.execution.exact else torch.complex64
            head_dim = self.transformer.config.attention_head_dim
            rotation = rotary_rotations(head_dim, start_frame, *grid, dtype)[None, :, None]
            # torch.compile fuses real arithmetic only.
            rotation = torch.view_as_real(rotation) if self.execution.compile else rotation
            self._rotations[key] = to_device(rotation, latents.device)
        return self._rotations[key]

    def sinusoid(self, timestep: float | Sequence[float], device: torch.device) -> torch.Tensor:
        """The sinusoid of a timestep, [channels], or of one a frame, [f, channels]. Every chunk has the same timesteps."""
        times = tuple(map(float, timestep)) if isinstance(timestep, Sequence) else float(timestep)
        key = times, device
        if key not in self._sinusoids:
            embedder = self.transformer.condition_embedder
            wide = torch.tensor(times, dtype=torch.float64)
            sinusoid = time_sinusoid(wide.reshape(-1), embedder.timesteps_proj.num_channels)
            dtype = next(embedder.time_embedder.parameters()).dtype
            self._sinusoids[key] = to_device(sinusoid.view(*wide.shape, -1).to(dtype), device)
        return self._sinusoids[key]

    @staticmethod
    def timesteps(timestep: float | Sequence[float], batch: int, device: torch.device) -> torch.Tensor:
        """What the transformer is called with, [B] or [B, f], made on the device."""
        if not isinstance(timestep, Sequence):
            return torch.full((batch,), float(timestep), device=device)
        return torch.stack([torch.full((batch,), float(time), device=device) for time in timestep], dim=1)

    def clear(self) -> None:
        """Let go of everything that is kept."""
        self._rotations.clear()
        self._sinusoids.clear()


def time_sinusoid(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """Sinusoidal embedding of timesteps [N] in float64, [N, channels], cosines first as Wan has them."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = torch.outer(timestep.to(torch.float64), torch.pow(10000, -exponent))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def condition_forward(embedder, context: PassContext):
    """A `forward` for the condition embedder: the sinusoid comes from the context, the prompt is projected once."""

    def forward(timestep, encoder_hidden_states, encoder_hidden_states_image=None, **_):
        projected = []
        for branch, (text,) in context.running.apart(encoder_hidden_states):
            if branch.prompt.projected is None:
                branch.prompt.projected = embedder.text_embedder(text)
            projected.append(branch.prompt.projected)
        prompts = torch.cat(projected) if len(projected) > 1 else projected[0]
        assert context.sinusoid is not None
        framewise = context.sinusoid.ndim == 2
        # One matrix row per frame, as the original computes it: the row count changes the rounding of the product. What comes
        # of them is broadcast over the videos of a batch, each of which so is what it is alone.
        rows = len(context.sinusoid) if framewise else context.running.time_rows
        sinusoid = context.sinusoid if framewise else context.sinusoid.repeat(rows, 1)
        time = embedder.time_embedder(sinusoid).type_as(encoder_hidden_states)
        modulation = embedder.time_proj(embedder.act_fn(time))
        if not framewise:
            return time[:1], modulation[:1], prompts, None
        assert context.rotation is not None
        tokens, batch = context.rotation.shape[1] // rows, len(timestep) // rows
        # The output norm wants a row for each token; the blocks, see `framewise`, one for each frame.
        time = time.repeat_interleave(tokens, dim=0).expand(batch, -1, -1)
        return time, modulation.expand(batch, -1, -1), prompts, None

    return forward


def video_by_video(embed_patches, weight: torch.Tensor):
    """A `forward` for the patch embedding: a convolution over a batch may round otherwise than over one video.

    weight: of the convolution, which is far too small for rounding it to pay.
    """

    def forward(latents):
        with exact_convolutions(weight):
            return (
                torch.cat([embed_patches(video) for video in latents.split(1)])
                if len(latents) > 1
                else embed_patches(latents)
            )

    return forward
