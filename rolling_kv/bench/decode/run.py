"""Decode the same latent frames in several ways, in turns, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from ...geometry import WAN_21
from ...vae.taehv import Taehv
from ...vae.wan import WanVAE, streamline
from ..gauges import memory_beside, now
from ..kinds import Kernels, taken_apart

Say = Callable[[str], None]

STOCK = "stock"
"""What the others are compared with."""
WARMUP = 2
"""Latent frames: the first one of a video is another piece of work than all that follow."""


@dataclass(frozen=True)
class DecodeExperiment:
    """vae: as diffusers makes it. tiny: a TAEHV decoder. height, width: pixels. repeats: timed latent frames of each way."""

    vae: AutoencoderKLWan
    tiny: Taehv
    height: int
    width: int
    repeats: int
    seed: int = 0

    def __post_init__(self):
        WAN_21.latent_size(self.height, self.width)

    @property
    def device(self) -> torch.device:
        return self.vae.quant_conv.weight.device

    def latents(self) -> Iterator[Tensor]:
        """Latent frames [1, C, 1, h, w], without an end."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = 1, WAN_21.channels, 1, *WAN_21.latent_size(self.height, self.width)
        while True:
            yield torch.randn(shape, generator=generator).to(self.device)


class Stream(Protocol):
    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]: ...


@dataclass
class DecodeResult:
    """way: how it is decoded. times: seconds of each latent frame. announced, peak: bytes beside the weights; None: not announced.

    difference: largest one of the pixels, which are from -1 to 1, from those of the stock VAE. kernels: of one latent frame.
    """

    way: str
    announced: int | None
    peak: int = 0
    difference: float = 0.0
    times: list[float] = field(default_factory=list)
    kernels: Kernels | None = None


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The VAE with the channels of its 3D convolutions last in memory, and nothing else changed."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def measure(experiment: DecodeExperiment, *, say: Say = print) -> list[DecodeResult]:
    """Decode. On a CPU, memory is followed in a stream of its own, before anything is timed."""
    streamlined = deepcopy(experiment.vae)
    streamline(streamlined)
    vaes = {
        STOCK: WanVAE(experiment.vae),
        "channels last": WanVAE(channels_last(deepcopy(experiment.vae))),
        "streamlined": WanVAE(streamlined),
    }
    announced = vaes[STOCK].decode_bytes(experiment.height, experiment.width)
    streams: dict[str, Callable[[], Stream]] = {way: vae.decoder for way, vae in vaes.items()}
    streams["tiny"] = experiment.tiny.stream
    results = {way: DecodeResult(way, None if way == "tiny" else announced) for way in streams}
    with torch.inference_mode():
        for way, stream in streams.items():
            results[way].peak = _peak(experiment, stream())
            say(f"memory, {way}")
        opened = {way: stream() for way, stream in streams.items()}
        latents = experiment.latents()
        for number in range(WARMUP + experiment.repeats):
            latent, expected = next(latents), None
            for way, stream in opened.items():
                start = now(experiment.device)
                frames = torch.cat(list(stream.decode_frames(latent)), dim=2)
                if number >= WARMUP:
                    results[way].times.append(now(experiment.device) - start)
                expected = frames if expected is None else expected
                off = float((frames - expected).abs().max())
                results[way].difference = max(results[way].difference, off)
            say(f"latent frame {number + 1} of {WARMUP + experiment.repeats}")
        for way, stream in opened.items():
            latent = next(latents)
            results[way].kernels = taken_apart(
                lambda stream=stream, latent=latent: list(stream.decode_frames(latent)), experiment.device
            )
    return list(results.values())


def _peak(experiment: DecodeExperiment, stream: Stream) -> int:
    """Most bytes in use while a latent frame in the middle of a video is decoded: what the stream keeps is part of it."""
    latents = experiment.latents()
    with memory_beside(experiment.device) as memory:
        for _ in range(WARMUP):
            list(stream.decode_frames(next(latents)))
        memory.restart()
        list(stream.decode_frames(next(latents)))
        now(experiment.device)
        return memory.peak
