"""From a prompt to a video file without ComfyUI: the engine's parts put together, streaming from end to end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from .bundled import check_model
from .checkpoints.model import CausalModel, load_model
from .config import CacheConfig, ExecutionConfig, SamplingConfig
from .devices import obtainable_memory, usable_device
from .fitting import Clip, Fitting, read_colour
from .footage import Footage
from .geometry import Geometry
from .growing import growing_place
from .lora.reader import load_lora
from .lora.stack import LoraStack
from .sampling.checks import long_sink_note, size_note
from .sampling.memory import check_fits, estimate
from .sampling.recomputed import needs_vae
from .sampling.scheduled import check_plan, cues, generate_scheduled, switches_of
from .sampling.session import RollingSession
from .sampling.shortage import telling_shortage
from .sampling.state import CacheState
from .sampling.state_file import check_state_path, load_state
from .sampling.steering import Shot, Steering
from .schedules.reading import read_schedule
from .schedules.schedule import Plan, PromptSchedule
from .streaming import ENDLESS_SECONDS, VideoStream
from .text import TextEncoder, load_text_encoder
from .vae.latents import to_model
from .vae.loading import AnyVAE, load_vae
from .video import PLAIN
from .wan.fast import product_bytes
from .wan.offloaded import move_outside, offload_blocks, weight_nbytes
from .wan.shards import HeadShards

logger = logging.getLogger(__name__)

UNLIMITED_FRAMES = 21
"""Latent frames that room is left for where a window has no end: those of 5 s."""
LAST_PROMPT_SECONDS = 5.0
"""What the last prompt of a schedule without an end gets where no length is given."""


class Interrupted(KeyboardInterrupt):
    """A run that Ctrl-C has ended, and of which something stays.

    video: the file, with the chunks that are done. state: the file from which to continue.
    seconds: of the video. left: seconds that are missing.
    """

    def __init__(self, video: Path, state: Path, seconds: float, left: float):
        super().__init__(f"{seconds:g} s are done")
        self.video, self.state, self.seconds, self.left = video, state, seconds, left


class Texts(Protocol):
    """What a pipeline asks of a `TextEncoder`."""

    def encode(self, prompts: list[str]) -> torch.Tensor: ...
    def encode_shot(self, prompt: str, marker: str) -> tuple[torch.Tensor, torch.Tensor | None]: ...
    def remark(self, prompts: Iterable[str]) -> str: ...


@dataclass(frozen=True)
class Pipeline:
    """A causal model with its text encoder and VAE."""

    model: CausalModel
    text_encoder: Texts
    vae: AnyVAE

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        text_encoder: str | Path | Texts | None = None,
        vae: str | Path | None = None,
        preset: str = "auto",
        dtype: str = "auto",
        storage: str = "model",
        loras: Sequence[tuple[str | Path, float]] = (),
        offload: bool = False,
        device: str | torch.device = "cpu",
    ) -> Pipeline:
        """Load all three. A diffusers folder holds the text encoder and the VAE too; give them for single files.

        text_encoder: a file or folder, or what does its work. The VAE has to be that of the model's latents, or a tiny decoder of
        them; that one makes videos from prompts alone.

        storage: how the model's weights are kept, see `load_model`. The text encoder runs on the CPU where it would leave no
        room on the device for a run. loras: files, each with its strength; they add up,
        and stay for good (`lora.stack` has the way back).
        offload: keep the weights of the model's blocks in CPU memory, see `wan.offloaded`.
        Raises CheckpointError for files that are missing or cannot be used.
        """
        device = usable_device(device)
        check_model(Path(model))
        parts: dict[str, Any] = {"text_encoder": text_encoder or model, "vae": vae or model}
        for name, path in parts.items():
            if path is model and not (Path(model) / name).is_dir():
                option = name.replace("_", "-")
                raise ValueError(f"{model} holds no {name.replace('_', ' ')}: name one with --{option}")
        opened = [(load_lora(path), strength) for path, strength in loras]
        place = torch.device("cpu") if offload else device
        causal = load_model(model, preset=preset, dtype=dtype, storage=storage, device=place, runs_on=device)
        LoraStack(causal).set(opened)
        for transformer in causal.transformers if offload else ():
            offload_blocks(transformer, device)
            move_outside(transformer, device)
        texts = text_encoder
        if texts is None or isinstance(texts, (str, Path)):
            texts = load_text_encoder(parts["text_encoder"], dtype=dtype, runs_on=device)
        decoder = load_vae(parts["vae"], dtype=dtype, device=device, geometry=causal.geometry)
        if isinstance(texts, TextEncoder):
            texts.to(texts.device_in(device, _room_beside(causal, decoder, device)))
        return cls(causal, texts, decoder)

    def generate(
        self,
        prompt: str | None,
        output: str | Path,
        *,
        height: int,
        width: int,
        seconds: float | None = None,
        schedule: PromptSchedule | str | None = None,
        seed: int = 0,
        negative_prompt: str = "",
        image: str | Path | None = None,
        video: str | Path | None = None,
        strength: float | None = None,
        last_seconds: float | None = None,
        fit: str = "crop",
        background: str = "#000000",
        sampling: SamplingConfig | None = None,
        cache: CacheConfig | None = None,
        scale: int = 1,
        encoder: str = PLAIN,
        execution: ExecutionConfig | None = None,
        state_in: str | Path | None = None,
        state_out: str | Path | None = None,
        new_only: bool = False,
        shards: HeadShards | None = None,
        on_pass: Callable[[int, int], None] | None = None,
        steer: Callable[[Steering], None] | None = None,
    ) -> Path:
        """Write a video of at least `seconds` to `output` (.mp4) while it is made; returns the path.

        Memory does not grow with the length. The video grows as NAME.growing.mp4, with its state beside it as NAME.journal,
        and takes its name at the end: see `VideoStream`. After Ctrl-C and after errors the chunks that are done stay as a
        video, and as a state from which to continue: in `state_out`, or beside the video.

        prompt: what the video shows; with a schedule None, or what it shows before the schedule's first prompt.
        seconds: None: what the schedule says, or else 5 for its last prompt; with a strength, as long as the video that is
            made anew. 0: until Ctrl-C.
        schedule: prompts and when they begin, or text that `read_schedule` reads.
        height, width: pixels, multiples of 16 (for Wan 2.2 5B: 32). scale: enlarge each pixel so many times.
        encoder: see `VideoWriter`.
        image: a picture that the video starts with.
        video: a video that it starts with, or its `last_seconds`; it is read and written in constant memory.
        strength: make that video anew instead: from 0 to 1, how far from it. With `state_in` it lies along the whole video, so
            that a run that was cancelled goes on where it was.
        fit, background: how image or video come to that size, see `fitting.Fitting` and `read_colour`.
        sampling, cache: by default the model's preset. execution, on_pass: see `RollingSession`.
        state_in: file or journal of a state to continue (see `sampling.state_file`), by `seconds` more. The video is all
            of it, from its beginning on; with `new_only` what is made now.
        state_out: file for the state at the end, .safetensors; it may be the same.
        shards: the processes that make the video together, each by calling this in the same way; the first one writes it.
        steer: called once before the run begins with what other threads may say to it while it goes on.
        Raises ValueError, before anything is sampled, for settings that cannot work or take more memory than there is.
        Raises FileExistsError where an earlier run of that name did not end, and Interrupted after Ctrl-C, where at least
        one chunk was done.
        """
        sampling = sampling or self.model.preset.sampling
        cache = cache or self.model.preset.cache
        fitting = Fitting(height, width, fit, read_colour(background))
        clip = clip_of(image, video, fitting, self.model.geometry, last_seconds)
        if video is not None and Path(video).resolve() == growing_place(output).resolve():
            raise ValueError(f"{video} would be written over while it is read: give the output another name")
        again = None if strength is None else sampling.at_strength(strength)
        if again is not None and video is None:
            raise ValueError("a strength says how far from a video another goes, and there is no video: give one")
        given = clip if again is None else None
        if given is not None:
            sampling.check_given()
        if state_out is not None:
            check_state_path(state_out)
        state = self._continued(state_in, given, (height, width))
        start = start_of(given, state.frames, sampling, self.model.geometry)
        if again is not None:
            seconds = seconds_anew(clip, seconds, start, sampling, self.model.geometry)
        endless = seconds == 0
        if new_only and state_in is None:
            raise ValueError(
                "only what is new can be written where a state is continued: give one (--state-in), or leave --new-only out"
            )
        plan = plan_prompts(prompt, schedule, sampling, self.model.geometry, seconds, start)
        marker = self.model.preset.cut_marker
        check_plan(plan, sampling, cache, marker)
        metadata = {"prompt": plan.begins[0][1].text if prompt is None else prompt, "seed": str(seed)}
        if schedule is not None:
            metadata["schedule"] = str(plan.snapped())
            for note in plan.notes:
                logger.info("%s", note)
        stream: VideoStream | _Unwritten = _Unwritten(output, state)
        if shards is None or shards.first:
            stream = VideoStream(
                output,
                self.vae,
                height,
                width,
                before=state,
                journal_in=state_in,
                new_only=new_only,
                state_out=state_out,
                scale=scale,
                encoder=encoder,
                metadata=metadata,
            )
        frames = start + sampling.frames_of(plan.chunks, start)
        sampling.check_length(plan.chunks, start, self.model.geometry)
        if endless and cache.unlimited:
            raise ValueError(
                "a video without an end needs a window: with all frames in it, memory grows with the video"
            )
        recomputed = needs_vae(cache, sampling, state, plan.chunks)
        if recomputed:
            self.vae.encoder()  # a tiny decoder has none, and says so now
        streams = 1 + recomputed  # one for the file, one for the context
        takes: dict[str, Any] = dict(
            sampling=sampling,
            cache=cache,
            device=self.model.compute_device(),
            frames=frames,
            dtype=self.model.dtype,
            decoding=streams * self.vae.decode_bytes(height, width)
            + (0 if clip is None else self.vae.encode_bytes(height, width)),
            weight_sets=len(self.model.transformers),
            joint_switch="joint" in switches_of(plan, cache, marker),
            ranks=1 if shards is None else shards.ranks,
            products=product_bytes(execution or ExecutionConfig(), self.model.transformer, self.model.compute_device()),
        )
        check_fits(self.model.transformer, height, width, **takes)
        size_told = size_note(self.model, height, width)
        for note in (size_told, long_sink_note(sampling, cache, frames), self.text_encoder.remark(plan.texts)):
            if note:
                logger.warning("%s", note)
        embeds = {text: self.text_encoder.encode_shot(text, marker) for text in plan.texts}
        negative = self.text_encoder.encode([negative_prompt]) if sampling.guided else None
        known = [(text, embed) for text, pair in embeds.items() for embed in pair if embed is not None]
        known += [] if negative is None else [(negative_prompt, negative)]

        def encode(text: str) -> Shot:
            shot = self.text_encoder.encode_shot(text, marker)
            known.extend((text, embed) for embed in shot if embed is not None)
            return shot

        steering = Steering(plan, encode, sampling, cache, marker)
        if steer is not None:
            if shards is not None:
                raise ValueError("a video that several processes share cannot be steered yet: leave one of the two out")
            steer(steering)
        session = RollingSession(
            self.model,
            next(cues(plan, embeds, cache, marker)).prompt,
            height=height,
            width=width,
            sampling=sampling,
            cache=cache,
            negative=negative,
            vae=self.vae,
            execution=execution,
            state=state,
            shards=shards,
            on_pass=on_pass,
        )
        try:
            with stream, telling_shortage(self.model.transformer, height, width, **takes), session:
                if given is not None:
                    latents = self._latents_of(given)
                    for size in sampling.prefill_sizes(self.model.geometry.latent_frames(given.count)):
                        session.prefill(torch.cat(list(islice(latents, size)), dim=2))
                        session.state = (
                            stream.add(session.state.named(known)) if session.state.chunks else session.state
                        )
                source: dict[str, Any] = {}
                if again is not None and clip is not None:
                    source = {"source": islice(self._latents_of(clip), start, None), "strength": strength}
                made = generate_scheduled(
                    session, plan, embeds, negative=negative, seed=seed, steering=steering, **source
                )
                for _ in steering.heeded(made, plan.chunks):
                    session.state = stream.add(session.state.named(known))
        except KeyboardInterrupt as error:
            if stream.state_file is None:
                raise
            done = stream.state.seconds
            left = 0.0 if endless else self.model.geometry.seconds(frames) - done
            raise Interrupted(stream.video, stream.state_file, done, left) from error
        except BaseException:
            if stream.kept:
                logger.warning("%s", stream.kept)
            raise
        return stream.video

    @torch.inference_mode()
    def _latents_of(self, clip: Clip) -> Iterator[torch.Tensor]:
        """The latent frames [1, C, 1, h, w] of a clip in model space, each as soon as its pictures are read."""
        for latent in self.vae.encode_frames(clip.frames()):
            yield to_model(latent)

    def _continued(self, state_in: str | Path | None, given: Clip | None, size: tuple[int, int]) -> CacheState:
        """The state that a run continues."""
        if state_in is None:
            return CacheState(model=self.model.identity, model_name=self.model.preset.name)
        if given is not None:
            raise ValueError(
                "a video that is continued has its beginning already: leave the image, or the video without a strength, out"
            )
        state = load_state(state_in, self.model, size)
        if state.chunks[0].shape[0] != 1:
            raise ValueError(f"{state_in} holds {state.chunks[0].shape[0]} videos; one at a time can be continued here")
        return state


class _Unwritten:
    """In the place of a `VideoStream` in a process that shares a video and does not write it."""

    kept = ""
    state_file = None

    def __init__(self, video: str | Path, state: CacheState):
        self.video, self.state = Path(video), state

    def add(self, state: CacheState) -> CacheState:
        self.state = state
        return state

    def __enter__(self) -> _Unwritten:
        return self

    def __exit__(self, *_) -> None: ...


def _room_beside(model: CausalModel, vae: AnyVAE, device: torch.device) -> int:
    """Bytes of a device beside a model and a VAE that are there, and a run with the model's own settings and size."""
    preset, size = model.preset, model.geometry.size
    run = estimate(
        model.transformer,
        *size,
        sampling=preset.sampling,
        cache=preset.cache,
        frames=preset.cache.limit or UNLIMITED_FRAMES,
        weight_sets=len(model.transformers),
    )
    held = sum(map(weight_nbytes, model.transformers)) + sum(tensor.nbytes for tensor in vae.parameters())
    return obtainable_memory(device) - held - run.device - vae.decode_bytes(*size)


def clip_of(
    image: str | Path | None,
    video: str | Path | None,
    fitting: Fitting,
    geometry: Geometry,
    last_seconds: float | None = None,
) -> Clip | None:
    """What is taken of a picture or a video; see `Pipeline.generate`. Raises ValueError for both, and for no such file."""
    if image is not None and video is not None:
        raise ValueError("a video starts with a picture or with another video: give one of them")
    if last_seconds is not None and video is None:
        raise ValueError("there is no video of which the last seconds could be taken: give one")
    if image is not None:
        return Clip.of(Footage.open(image), fitting, geometry, "first", 1 / geometry.fps)
    if video is None:
        return None
    taken = ("all", 0.0) if last_seconds is None else ("last", last_seconds)
    return Clip.of(Footage.open(video), fitting, geometry, *taken)


def start_of(given: Clip | None, frames: int, sampling: SamplingConfig, geometry: Geometry) -> int:
    """Latent frames before the first chunk that is made. given: what it starts with. frames: of the state it continues."""
    before = 0 if given is None else geometry.latent_frames(given.count)
    return frames if not before or sampling.given_inside(before) else before


def seconds_anew(
    clip: Clip | None, seconds: float | None, start: int, sampling: SamplingConfig, geometry: Geometry
) -> float:
    """How much of a video is made anew, from a latent frame on. Raises ValueError where it is shorter than `seconds`."""
    frames = 0 if clip is None else geometry.latent_frames(clip.count)
    chunks = sampling.chunks_within(max(frames - start, 0), start)
    if seconds is not None:
        wanted = sampling.chunks_for_seconds(seconds or ENDLESS_SECONDS, start, geometry)
        if wanted <= chunks:
            return seconds
    if seconds is not None or not chunks:
        raise ValueError(
            f"the video has {geometry.seconds(frames):g} s to be made anew, of which {geometry.seconds(start):g} s are done: "
            f"that is {chunks} chunks, fewer than asked for; leave the seconds out, or give a longer video"
        )
    return geometry.seconds(start + sampling.frames_of(chunks, start)) - geometry.seconds(start)


def plan_prompts(
    prompt: str | None,
    schedule: PromptSchedule | str | None,
    sampling: SamplingConfig,
    geometry: Geometry,
    seconds: float | None = None,
    start_frame: int = 0,
) -> Plan:
    """What the chunks of a video are made with, from a latent frame on: see `Pipeline.generate`.

    Raises ValueError for what does not go together.
    """
    if isinstance(schedule, str):
        schedule = read_schedule(schedule)
    if schedule is None:
        if prompt is None:
            raise ValueError("there is neither a prompt nor a schedule: give one of them")
        schedule = PromptSchedule.of(prompt)
    elif prompt is not None:
        schedule = schedule.led_by(prompt)
    if seconds is not None:
        seconds = seconds or ENDLESS_SECONDS
        chunks = sampling.chunks_for_seconds(seconds, start_frame, geometry)
    else:
        chunks = schedule.chunks(sampling, geometry, start_frame=start_frame, last=LAST_PROMPT_SECONDS)
    return schedule.plan(sampling, geometry, chunks=chunks, start_frame=start_frame)
