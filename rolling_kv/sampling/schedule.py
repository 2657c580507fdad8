"""From noise to one clean chunk: few-step re-noising, and many-step integration of the flow.

Flow matching as Wan uses it: x_t = (1 - sigma) * x0 + sigma * noise, the model predicts noise - x0, and
timestep = 1000 * sigma.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.overrides import TorchFunctionMode

from ..config import SamplingConfig
from ..devices import has_float64, to_device
from .state import Seeds

TRAIN_TIMESTEPS = 1000
Predict = Callable[[torch.Tensor, float], torch.Tensor]
"""(x_t [B, C, f, h, w], timestep) -> predicted flow of the same shape."""
Noise = Callable[[int], torch.Tensor]
"""Draw number n of a chunk: 0 is the initial noise, n > 0 the fresh noise after step n - 1. [B, C, f, h, w]"""


NoiseSource = Callable[[int, int, tuple[int, ...]], torch.Tensor]
"""(first latent frame of the chunk, draw, shape) -> noise [B, C, f, h, w]: a caller's own draws."""


class Step(NamedTuple):
    timestep: float
    sigma: torch.Tensor  # 0-dim, float32


def flow_schedule(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The training schedule: (timesteps, sigmas), float32 [1000] each, falling from pure noise.

    sigma = shift * s / (1 + (shift - 1) * s) for s from 1 to 0.001. Source: Self-Forcing, utils/scheduler.py.
    """
    linear = torch.linspace(1.0, 0.0, TRAIN_TIMESTEPS + 1)[:-1]
    sigmas = shift * linear / (1 + (shift - 1) * linear)
    return sigmas * TRAIN_TIMESTEPS, sigmas


def warp_steps(denoising_steps: tuple[int, ...], shift: float) -> list[Step]:
    """Few-step timesteps after the shift: 1000, 750, 500, 250 become 1000, 937.5, 833.3, 625 at shift 5.

    The schedule has no sigma for timestep 0: there the model is told 0, and the sigma is the last one.
    """
    timesteps, sigmas = flow_schedule(shift)
    timesteps, sigmas = torch.cat([timesteps, timesteps.new_zeros(1)]), torch.cat([sigmas, sigmas[-1:]])
    return [Step(timesteps[TRAIN_TIMESTEPS - s].item(), sigmas[TRAIN_TIMESTEPS - s]) for s in denoising_steps]


def renoise_chunk(predict: Predict, noise: Noise, steps: list[Step]) -> torch.Tensor:
    """Few-step sampling: predict the clean chunk, add fresh noise at the next level, repeat. [B, C, f, h, w]"""
    x = noise(0)
    for index, step in enumerate(steps):
        clean = clean_prediction(x, predict(x, step.timestep), step)
        if index + 1 < len(steps):
            x = renoised(clean, noise(index + 1), steps[index + 1]).to(x.dtype)
    return clean


def clean_prediction(x: torch.Tensor, flow: torch.Tensor, step: Step) -> torch.Tensor:
    """The clean latents that a flow predicted at `step` means, in the flow's dtype."""
    wide = torch.float64 if has_float64(x.device) else torch.float32
    # Numbers of the CPU, not tensors: they go to the device with the operation itself.
    return (x.to(wide) - step.sigma.item() * flow.to(wide)).to(flow.dtype)


def renoised(clean: torch.Tensor, noise: torch.Tensor, step: Step) -> torch.Tensor:
    """Clean latents with fresh noise, at the level of `step`. Half-precision latents are mixed in float32, as in training."""
    return (1 - step.sigma).item() * clean.float() + step.sigma.item() * noise.float()


def starting_from(source: torch.Tensor, noise: Noise, step: Step) -> Noise:
    """The draws of a chunk that begins as `source`, latents [B, C, f, h, w], with as much noise as the first step expects."""

    def draw(number: int) -> torch.Tensor:
        fresh = noise(number)
        return fresh if number else renoised(source.to(fresh), fresh, step).to(fresh.dtype)

    return draw


def integrate_chunk(predict: Predict, noise: Noise, config: SamplingConfig) -> torch.Tensor:
    """Many-step sampling with diffusers' UniPC or Euler solver on the shifted flow. [B, C, f, h, w]"""
    scheduler = make_scheduler(config)
    x = noise(0)
    # The original starts one training step below pure noise, and ends at zero.
    sigmas = np.linspace(1 - 1 / TRAIN_TIMESTEPS, 0, config.num_inference_steps + 1)[:-1]
    scheduler.set_timesteps(sigmas=sigmas, device="cpu")
    scheduler.set_begin_index(0)  # else the first step searches for its timestep
    # Timesteps are read here; the sigmas are calculated with there.
    scheduler.sigmas = to_device(scheduler.sigmas, x.device)
    for timestep in scheduler.timesteps:
        # As wide as x: a device rounds a sigma to the dtype of the half-precision flow that it multiplies.
        flow = predict(x, timestep.item()).to(x.dtype)
        with _UncheckedSolve():
            x = scheduler.step(flow, timestep, x, return_dict=False)[0]
    return x


class _UncheckedSolve(TorchFunctionMode):
    """Lets UniPC's corrector solve its small systems without waiting for the device.

    torch.linalg.solve asks the device whether it has failed; these systems have a solution by construction.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {})).result
        return func(*args, **(kwargs or {}))


def make_scheduler(config: SamplingConfig) -> Any:
    """A fresh diffusers scheduler for `config.sampler`; solvers keep state, so one serves one chunk."""
    if config.sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=config.shift)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift, solver_order=2
    )


def sample_chunk(predict: Predict, noise: Noise, config: SamplingConfig, start_frame: int) -> torch.Tensor:
    """The clean chunk that starts at absolute latent frame `start_frame`, [B, C, f, h, w] in model space.

    predict: the model. noise: the chunk's draws. config: how its frames are made.
    """
    if config.few_step:
        return renoise_chunk(predict, noise, warp_steps(config.steps_at(start_frame), config.shift))
    return integrate_chunk(predict, noise, config)


def seeded_noise(seed: Seeds, start_frame: int, shape: tuple[int, ...], draw: int) -> torch.Tensor:
    """Counter-based noise: a function of (seed, first latent frame of the chunk, draw, batch index), nothing else.

    So any split of a video into runs, and any device, gives the same draws. A video with a seed of its own has those that
    it would have alone, those of index 0. Float32 on the CPU, [B, C, f, h, w].
    """
    samples = []
    videos = [(own, 0) for own in seed] if isinstance(seed, tuple) else [(seed, index) for index in range(shape[0])]
    for own, index in videos:
        counter = hashlib.sha256(f"rolling-kv {own} {start_frame} {draw} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(counter[:8], "little") >> 1)
        samples.append(torch.randn(shape[1:], generator=generator))
    return torch.stack(samples)


def chunk_noise(
    source: NoiseSource | None,
    seed: Seeds,
    start_frame: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Noise:
    """The draws of one chunk, [B, C, f, h, w], from `source` or, without one, `seeded_noise`."""

    def draw(number: int) -> torch.Tensor:
        noise = source(start_frame, number, shape) if source else seeded_noise(seed, start_frame, shape, number)
        return to_device(noise.to(dtype), device)

    return draw
