"""The same video twice: part by part, and as the pipeline makes it, where the parts run beside each other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...pipeline import Pipeline
from ...sampling.session import RollingSession
from ...vae.latents import to_raw
from ...vae.loading import AnyVAE
from ...vae.taehv import TinyDecoder
from ...vae.wan import StreamingDecoder
from ...video import PLAIN, VideoWriter, read_video_info, to_uint8
from ..gauges import now

PROMPT = "a red circle moving left"


class RandomTexts:
    """Stands for a text encoder: one embedding for all prompts, which costs nothing."""

    def __init__(self, prompt: Tensor):
        self.prompt = prompt

    def encode(self, prompts: list[str]) -> Tensor:
        return self.prompt.expand(len(prompts), -1, -1)

    def encode_shot(self, prompt: str, marker: str) -> tuple[Tensor, Tensor | None]:
        return self.prompt, None

    def remark(self, prompts: Iterable[str]) -> str:
        return ""


class NotedDecoder:
    """A stream that notes when the first frame is there."""

    def __init__(self, stream: StreamingDecoder | TinyDecoder):
        self._stream = stream
        self.first: float | None = None

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        for frames in self._stream.decode_frames(latents):
            if self.first is None:
                self.first = now(frames.device)
            yield frames


class NotedVAE:
    """A VAE whose latest stream is looked at later."""

    stream: NotedDecoder

    def __init__(self, vae: AnyVAE):
        self._vae = vae

    def decoder(self) -> NotedDecoder:
        self.stream = NotedDecoder(self._vae.decoder())
        return self.stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)


class PipelineExperiment(NamedTuple):
    """pipeline: what makes the video. height, width: pixels. chunks: of the video. encoder: of `video.ENCODERS`."""

    pipeline: Pipeline
    height: int
    width: int
    chunks: int
    seed: int = 0
    encoder: str = PLAIN

    @property
    def seconds(self) -> float:
        """Length of the video."""
        model = self.pipeline.model
        return model.geometry.seconds(model.preset.sampling.frames_of(self.chunks))


class PipelineResult(NamedTuple):
    """frames: of the video. whole, first_frame: seconds until the file is there, and until the first picture is decoded.

    parts: seconds of each part alone: text, sampling, decoding, encoding. encoder: that was used.
    """

    frames: int
    whole: float
    first_frame: float
    parts: dict[str, float]
    encoder: str = PLAIN

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.whole

    @property
    def shares(self) -> dict[str, float]:
        """Of the time that the parts take one after the other."""
        together = sum(self.parts.values())
        return {part: took / together for part, took in self.parts.items()}


def measure(experiment: PipelineExperiment) -> PipelineResult:
    """Make the video. What is set up once, in CUDA's libraries for example, is set up by the parts, which come first."""
    with TemporaryDirectory() as folder:
        _parts(experiment._replace(chunks=1), Path(folder))
        parts, encoder = _parts(experiment, Path(folder))
        pipeline = experiment.pipeline
        noted: Any = NotedVAE(pipeline.vae)
        start = time.perf_counter()
        Pipeline(pipeline.model, pipeline.text_encoder, noted).generate(
            PROMPT,
            Path(folder, "whole.mp4"),
            height=experiment.height,
            width=experiment.width,
            seconds=experiment.seconds,
            seed=experiment.seed,
            encoder=experiment.encoder,
        )
        whole = time.perf_counter() - start
        frames = read_video_info(Path(folder, "whole.mp4")).frames
    first = (noted.stream.first or start) - start
    return PipelineResult(frames, whole, first, parts, encoder)


def _parts(experiment: PipelineExperiment, folder: Path) -> tuple[dict[str, float], str]:
    """Seconds of each part, one after the other, and the encoder that was used."""
    pipeline = experiment.pipeline
    device, seconds = pipeline.model.compute_device(), {}
    start = now(device)

    def done(part: str) -> None:
        nonlocal start
        end = now(device)
        seconds[part], start = end - start, end

    prompt = pipeline.text_encoder.encode([PROMPT])
    done("text")
    session = RollingSession(pipeline.model, prompt, height=experiment.height, width=experiment.width)
    with session:
        for _ in session.generate(experiment.chunks, seed=experiment.seed):
            pass
    done("sampling")
    latents = to_raw(session.state.latents().float())
    with torch.inference_mode():
        frames = [to_uint8(part[0]).permute(1, 2, 3, 0).cpu() for part in pipeline.vae.decoder().decode_frames(latents)]
    done("decoding")
    size = experiment.width, experiment.height
    with VideoWriter(folder / "parts.mp4", *size, encoder=experiment.encoder) as writer:
        for part in frames:
            writer.write(part)
    done("encoding")
    return seconds, writer.encoder
