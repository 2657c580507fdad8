"""How the frames of a chunk are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..geometry import WAN_21, Geometry
from ..messages import shortened, shown
from .cache import ALL_FRAMES, CacheConfig
from .checks import check_choice, check_flag, check_real, check_whole

MOST_CHUNK_FRAMES = 64
MOST_STEPS = 1000
"""Denoising steps of a chunk: as many as there are training timesteps."""

SAMPLERS = ("renoise", "rolling", "unipc", "euler")
GIVEN_FRAMES = ("own chunk", "in chunk")


@dataclass(frozen=True)
class SamplingConfig:
    """How the frames of one chunk are made.

    chunk: latent frames per chunk, as the checkpoint was trained (3: chunk-wise, 1: frame-wise).
    independent_first_frame: the video starts with a chunk of one latent frame: 1, k, k, …
    sampler: "renoise" is few-step (distilled models): predict the clean chunk, add fresh noise, repeat. "rolling" does
        that to as many chunks as there are steps at once, each a step behind the one before it (Rolling-Forcing). "unipc"
        and "euler" integrate the flow in `num_inference_steps` steps, for models that are not distilled.
    denoising_steps: for "renoise" and "rolling", the training timesteps (1000 is pure noise) before the shift warps them.
        The last may be 0, the end of the schedule, as Krea Realtime has it.
    first_chunk_steps: the same for the chunks that start the video, where they differ: the steps of the first chunk
        (Causal-Forcing++), or of each of the first ones (DiagDistill). Kept as a tuple for each of them.
    shift: timestep shift of the flow schedule.
    guidance_scale: classifier-free guidance; 1 turns it off (one model pass per step instead of two).
    context_noise: timestep at which a finished chunk is written to the cache.
    given_frame: how one given frame starts a video. "own chunk": as a chunk of its own, before the first that is made.
        "in chunk": as the first frame of that chunk, clean while the others are made (LongLive 2).
    """

    chunk: int = 3
    independent_first_frame: bool = False
    sampler: str = "renoise"
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_chunk_steps: tuple[tuple[int, ...], ...] | None = None
    num_inference_steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 1.0
    context_noise: float = 0.0
    given_frame: str = "own chunk"

    def __post_init__(self):
        check_choice("given_frame", self.given_frame, GIVEN_FRAMES)
        check_whole("chunk", self.chunk, 1, MOST_CHUNK_FRAMES, "latent frame")
        check_flag("independent_first_frame", self.independent_first_frame)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_whole("num_inference_steps", self.num_inference_steps, 1, MOST_STEPS)
        check_real("guidance_scale", self.guidance_scale, 0, 1000)
        if isinstance(self.shift, (int, float)) and self.shift <= 0:
            raise ValueError(f"shift must be positive, got {shown(self.shift)}")
        check_real("shift", self.shift, 0, 1000)
        if not _is_timestep(self.context_noise, 0):
            raise ValueError(f"context_noise is a timestep from 0 to 1000, got {shown(self.context_noise)}")
        object.__setattr__(self, "denoising_steps", _falling(self.denoising_steps))
        if self.first_chunk_steps is not None:
            object.__setattr__(self, "first_chunk_steps", _first_chunks(self.first_chunk_steps))
        if self.joint and (self.independent_first_frame or self.first_chunk_steps):
            other = "a first chunk of one frame" if self.independent_first_frame else "first_chunk_steps"
            raise ValueError(
                f'the sampler "rolling" makes chunks together, in equal sizes and steps: it cannot go with {other}'
            )

    @property
    def few_step(self) -> bool:
        """Whether chunks are made in a few re-noised steps, as distilled models do, rather than by a solver in many."""
        return self.sampler in ("renoise", "rolling")

    @property
    def joint(self) -> bool:
        """Whether one pass holds several chunks, each at a noise level of its own."""
        return self.sampler == "rolling"

    @property
    def frames_at_once(self) -> int:
        """Latent frames of the largest pass."""
        return self.chunk * (len(self.denoising_steps) if self.joint else 1)

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance, and so a second branch with the negative prompt."""
        return self.guidance_scale != 1.0

    @property
    def branches(self) -> int:
        """Guidance branches: 2 with guidance, else 1."""
        return 2 if self.guided else 1

    @property
    def passes(self) -> int:
        """Denoising steps of a chunk that is none of the first ones, not counting its context pass."""
        return len(self.denoising_steps) if self.few_step else self.num_inference_steps

    @property
    def first_passes(self) -> tuple[int, ...]:
        """Denoising steps of each of the first chunks that have steps of their own."""
        return tuple(map(len, self.first_chunk_steps or ())) if self.few_step else ()

    def steps_at(self, start_frame: int) -> tuple[int, ...]:
        """Few-step timesteps of the chunk that starts at absolute latent frame `start_frame`."""
        first = self.first_chunk_steps or ()
        number = -(-start_frame // self.chunk)  # given frames count as the chunks that they fill or begin
        return first[number] if number < len(first) else self.denoising_steps

    def at_strength(self, strength: float) -> SamplingConfig:
        """The same with all steps scaled by `strength`, 0 to 1: for given latents, of which a part is to stay.

        Raises ValueError where a solver integrates the flow, and for a strength so small that the steps fall together.
        """
        if self.sampler != "renoise":
            raise ValueError(f'latents to start from need the sampler "renoise", and this is "{self.sampler}"')
        check_real("strength", strength, 0, 1)

        def scaled(steps: Sequence[float]) -> tuple[int, ...]:
            weaker = tuple(int(step * strength + 1e-6) for step in steps)  # what is whole but for rounding stays whole
            if len({*weaker, 0}) < len({*steps, 0}):
                raise ValueError(f"strength {strength:g} is too little for {len(steps)} steps: make it larger")
            return weaker

        first = self.first_chunk_steps
        return replace(
            self,
            denoising_steps=scaled(self.denoising_steps),
            first_chunk_steps=first and tuple(map(scaled, first)),
        )

    def passes_at(self, start_frame: int) -> int:
        """Denoising steps of the chunk that starts at `start_frame`, not counting its context pass."""
        return len(self.steps_at(start_frame)) if self.few_step else self.num_inference_steps

    def passes_for(self, chunks: int, start_frame: int = 0) -> int:
        """Passes that make `chunks` chunks, at least 1, from `start_frame` on: denoising steps, and a context pass between."""
        if self.joint:  # every chunk enters with a pass, and the last one takes its other steps
            return chunks + self.passes - 1 + (chunks - 1)
        steps = (chunks - 1) + chunks * self.passes
        for size in self.chunk_sizes(min(chunks, len(self.first_passes)), start_frame):
            steps += self.passes_at(start_frame) - self.passes
            start_frame += size
        return steps

    def check_length(self, chunks: int, start_frame: int = 0, geometry: Geometry = WAN_21) -> None:
        """Raise ValueError if `chunks` chunks cannot be made in one go, from absolute latent frame `start_frame` on."""
        least = len(self.denoising_steps) if self.joint else 1
        if 0 < chunks < least:
            frames = least * self.chunk
            seconds = geometry.seconds(start_frame + frames) - geometry.seconds(start_frame)
            raise ValueError(
                f'the sampler "rolling" makes at least as many chunks at a time as it has steps: {least}, not {chunks}. '
                f"The shortest length is {least} chunks, {frames} latent frames or {math.ceil(seconds * 100) / 100:g} s"
            )

    def check_given(self) -> None:
        """Raise ValueError if no frames can be given to start from."""
        if self.joint:
            raise ValueError(
                'the sampler "rolling" starts from noise, as its models were trained: it takes no image or video to start '
                "from. Leave the initial latents out; a video that has been made can be continued from its cache state"
            )

    def check_cache(self, cache: CacheConfig) -> None:
        """Raise ValueError unless a cache with these rules can be sampled with."""
        cache.check_chunk(self.chunk)
        if not self.joint:
            return
        if cache.unlimited:
            raise ValueError(
                f'the sampler "rolling" needs a window, the latent frames that its passes see, got {ALL_FRAMES} frames'
            )
        rules = {"positions": "absolute", "leaving": "drop", "switch": "hold", "context": "kept"}
        for name, only in rules.items():
            if (chosen := getattr(cache, name)) != only:
                raise ValueError(
                    f'the sampler "rolling" has rules of its own for the cache: {name} must be "{only}", got "{chosen}"'
                )

    def given_inside(self, frames: int, start_frame: int = 0) -> bool:
        """Whether that many given frames lie in the first chunk that is made, instead of before it."""
        return self.given_frame == "in chunk" and (frames, start_frame) == (1, 0) and self.chunk_size(0) > 1

    def prefill_sizes(self, frames: int, start_frame: int = 0) -> list[int]:
        """Chunk sizes in which given latent frames enter a cache that holds `start_frame`; an odd remainder comes first."""
        sizes = []
        if self.independent_first_frame and frames and start_frame == 0:
            sizes, frames = [1], frames - 1
        if frames % self.chunk:
            sizes.append(frames % self.chunk)
        return sizes + [self.chunk] * (frames // self.chunk)

    def chunk_size(self, start_frame: int) -> int:
        """Latent frames of the chunk that starts at absolute latent frame `start_frame`."""
        return 1 if self.independent_first_frame and start_frame == 0 else self.chunk

    def chunks_for_seconds(self, seconds: float, start_frame: int = 0, geometry: Geometry = WAN_21) -> int:
        """Number of chunks that make at least `seconds` of video, continuing after `start_frame` latent frames."""
        frames = geometry.latent_frames_for(seconds, start_frame)
        first = self.chunk_size(start_frame)
        return 1 + max(math.ceil((frames - first) / self.chunk), 0)

    def chunk_sizes(self, chunks: int, start_frame: int = 0) -> Iterator[int]:
        """Latent frames of each of `chunks` chunks from absolute latent frame `start_frame` on."""
        return (self.chunk_size(start_frame) if number == 0 else self.chunk for number in range(chunks))

    def chunks_within(self, frames: int, start_frame: int = 0) -> int:
        """The most chunks that have at most `frames` latent frames together, from absolute latent frame `start_frame` on."""
        first = self.chunk_size(start_frame)
        return 0 if frames < first else 1 + (frames - first) // self.chunk

    def frames_of(self, chunks: int, start_frame: int = 0) -> int:
        """Latent frames of `chunks` chunks together, from absolute latent frame `start_frame` on."""
        return self.chunk_size(start_frame) + (chunks - 1) * self.chunk if chunks else 0


def _is_timestep(value: object, low: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= 1000


def _falling(steps: Sequence[float]) -> tuple[float, ...]:
    """Denoising steps as a tuple. Raises ValueError unless they are timesteps that fall."""
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise ValueError(f"denoising steps must be a list of timesteps, got {shown(steps)}")
    steps = tuple(steps)
    numbers = 0 < len(steps) <= MOST_STEPS and all(_is_timestep(step, 0) for step in steps)
    if not numbers or list(steps) != sorted(set(steps), reverse=True) or not steps[0]:
        got = f"[{', '.join(map(shown, steps[:9]))}{', …' if len(steps) > 9 else ''}]"
        raise ValueError(
            f"denoising steps must fall from at most 1000, and only the last of several may be 0, got {shortened(got, 200)}"
        )
    return steps


def _first_chunks(steps: Sequence) -> tuple[tuple[float, ...], ...]:
    """Denoising steps of each of the first chunks, given so or as those of the first alone. Raises ValueError."""
    several = isinstance(steps, Sequence) and steps and all(isinstance(chunk, (list, tuple)) for chunk in steps)
    if several and len(steps) > MOST_STEPS:
        raise ValueError(f"first_chunk_steps are those of at most {MOST_STEPS} chunks, got {len(steps)}")
    return tuple(map(_falling, steps if several else (steps,)))
