"""Settings as frozen values: what the cache keeps, how a chunk is sampled, how passes are computed.

Units: `chunk`, `window` and `sink` count latent frames. One latent frame is four pixel frames, the very first is one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

from .cache.codecs import CODECS
from .devices import has_float64
from .geometry import WAN_21, Geometry
from .messages import shortened, shown

ALL_FRAMES: Final = "all"
"""A window that keeps every frame."""

MOST_FRAMES = 4096
"""Latent frames of a window: more than any memory holds at 480p."""
MOST_CHUNK_FRAMES = 64
MOST_STEPS = 1000
"""Denoising steps of a chunk: as many as there are training timesteps."""

SAMPLERS = ("renoise", "rolling", "unipc", "euler")
POSITIONS = ("absolute", "window")
LEAVING = ("drop", "ema", "memory")
ACCUMULATION = ("float32", "model")
SWITCHES = ("hold", "joint", "causal", "flush", "cut")
CONTEXTS = ("kept", "recomputed")
GIVEN_FRAMES = ("own chunk", "in chunk")
CACHE_STORAGES = tuple(CODECS)
WEIGHT_STORAGES = ("model", "float8")
"""How weights are stored: in the dtype that the model computes in, or the blocks' Linear layers in float8_e4m3fn."""
ATTENTION_BACKENDS = ("native", "_native_cudnn", "flash", "_flash_3", "sage", "xformers")
"""Those of diffusers' attention backends that attend without a mask and download nothing."""
ANY_DEVICE_BACKEND = "native"
"""The one of them that is not for CUDA alone."""
RECORDABLE_PACKINGS = ("Q8_0", "BF16")
"""GGUF packings that diffusers unpacks on the device alone; for all others the CPU waits in every layer."""


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, (str, int)) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


def check_whole(name: str, value: object, low: int, high: int, unit: str = "") -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`. unit: what it counts, in the singular."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    if low == 0 and value < 0:
        raise ValueError(f"{name} must not be negative, got {shown(value)}")
    if not low <= value <= high:
        side, bound = ("least", low) if value < low else ("most", high)
        counted = unit and f" {unit}{'s' * (bound != 1)}"
        raise ValueError(f"{name} must be at {side} {bound}{counted}, got {shown(value)}")


def check_real(name: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a number from `low` to `high`, and so a finite one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")


@dataclass(frozen=True)
class CacheConfig:
    """What a rolling cache keeps, and by which rules: what a family of models was trained with, as values that compose.

    window: latent frames that a chunk attends to, counting the sink and the chunk itself; ALL_FRAMES keeps every frame.
    sink: the first latent frames of the video, which never leave the window.
    positions: where keys stand in time. "absolute": at the frame's number, for ever; the sink's distance grows with the
        video. "window": at their place in the window, so that the sink always stands just before the rest.
    span: for "window" positions, the latent frames that positions run over before the sink follows; None: the window
        itself (Self Gradient Forcing: 21, with a window of 12).
    leaving: what becomes of frames that leave. "drop": nothing. "ema": they are folded into the sink, as a moving average
        (Reward-Forcing). "memory": their mean is folded into two frames behind the sink (MemRoPE), of which one changes
        slowly and one fast.
    ema_alpha: for "ema", the share of the sink's old value that stays.
    memory_alphas: for "memory", the share of the new mean in the slow and in the fast memory.
    accumulate: in which dtype either average is kept; "model" is the model's own, as the originals do it, where small
        shares are lost to rounding.
    switch: what the family does when the prompt changes. "hold": nothing, keys keep the old prompt. "joint", "causal":
        the window is computed anew under the new prompt, in one pass without a mask or chunk by chunk. "flush": only the
        first frame and the last two stay. "cut": a new shot.
    global_sink: whether the sink outlives a switch that computes the window anew; else the window's first frames become
        the sink.
    cut_flush: whether a cut begins with a flush (Infinity-RoPE).
    cut_offset: latent frames by which a cut moves its chunk away in time; with "absolute" positions all later ones too.
    shot_sink: whether a cut keeps the first frames of its chunk, as many as the sink has, until the next cut (LongLive 2).
    shot_clean: whether the chunk of a cut enters a cache that holds nothing but the sink.
    context: "kept": keys and values stay from chunk to chunk. "recomputed": the frames in view are computed anew before
        every chunk, at the positions 0, 1, 2, … (Krea Realtime). With a sink, which is 1, the first of them is always the
        video's first frame; without, it is in time one that was decoded and encoded again, which needs a VAE.
    storage: in which form, one of `cache.codecs.CODECS`; "model" is the model's dtype.
    offload: keep the keys and values in CPU memory and bring one layer at a time to the device.

    Fields with a help text are options of the command line; those with `at_switch` where prompts can change.
    """

    window: int | Literal["all"] = 21
    sink: int = field(default=0, metadata={"help": "first latent frames that never leave the window"})
    positions: str = field(
        default="absolute",
        metadata={
            "help": "where keys stand in time: at their frame's number for ever, or at their place in the window, the sink "
            "just before the rest",
            "choices": POSITIONS,
        },
    )
    storage: str = "model"
    offload: bool = False
    span: int | None = field(
        default=None,
        metadata={
            "help": "with window positions: latent frames that they run over before the sink follows; where positions are "
            "given and this is not, the window itself"
        },
    )
    leaving: str = field(
        default="drop",
        metadata={
            "help": "what becomes of frames that leave: nothing, averaged into the sink, or into two frames behind it",
            "choices": LEAVING,
        },
    )
    ema_alpha: float = field(default=0.999, metadata={"help": "for ema, the share of the sink's old value that stays"})
    memory_alphas: tuple[float, float] = field(
        default=(0.01, 0.1), metadata={"help": "for memory, the share of what leaves in the slow and in the fast frame"}
    )
    accumulate: str = field(default="float32", metadata={"help": "dtype of either average", "choices": ACCUMULATION})
    switch: str = field(
        default="hold",
        metadata={
            "help": "what happens when the prompt changes, where the schedule does not say",
            "choices": SWITCHES,
            "at_switch": True,
        },
    )
    global_sink: bool = field(
        default=True,
        metadata={"help": "let the sink outlive a switch that computes the window anew", "at_switch": True},
    )
    cut_flush: bool = field(default=True, metadata={"help": "begin a cut with a flush", "at_switch": True})
    cut_offset: float = field(
        default=42, metadata={"help": "latent frames by which a cut moves its chunk away in time", "at_switch": True}
    )
    shot_sink: bool = field(
        default=False,
        metadata={"help": "let a cut keep the first frames of its chunk until the next cut", "at_switch": True},
    )
    shot_clean: bool = field(
        default=False,
        metadata={"help": "let a cut's chunk enter a cache that holds nothing but the sink", "at_switch": True},
    )
    context: str = field(
        default="kept",
        metadata={
            "help": "keys and values stay from chunk to chunk, or are computed anew before each",
            "choices": CONTEXTS,
        },
    )

    def __post_init__(self):
        check_choice("positions", self.positions, POSITIONS)
        check_choice("storage", self.storage, CACHE_STORAGES)
        check_choice("leaving", self.leaving, LEAVING)
        check_choice("accumulate", self.accumulate, ACCUMULATION)
        check_choice("switch", self.switch, SWITCHES)
        check_choice("context", self.context, CONTEXTS)
        for name in ("offload", "global_sink", "cut_flush", "shot_sink", "shot_clean"):
            check_flag(name, getattr(self, name))
        if self.window != ALL_FRAMES:
            whole = isinstance(self.window, int) and not isinstance(self.window, bool)
            if not whole or self.window < 1:
                raise ValueError(
                    f'window must be "{ALL_FRAMES}" (keep every frame) or at least 1 latent frame, got {shown(self.window)}'
                )
            check_whole("window", self.window, 1, MOST_FRAMES, "latent frame")
        check_whole("sink", self.sink, 0, MOST_FRAMES, "latent frame")
        check_real("cut_offset", self.cut_offset, 0, MOST_FRAMES)
        check_real("ema_alpha", self.ema_alpha, 0, 1)
        alphas = self.memory_alphas
        if not isinstance(alphas, Sequence) or isinstance(alphas, str) or len(alphas) != 2:
            raise ValueError(f"memory_alphas are two shares, of the slow and the fast memory, got {shown(alphas)}")
        for alpha in alphas:
            check_real("each of memory_alphas", alpha, 0, 1)
        object.__setattr__(self, "memory_alphas", tuple(alphas))
        if self.span is not None:
            check_whole("span", self.span, 1, MOST_FRAMES, "latent frame")
        self._check_together()

    def _check_together(self) -> None:
        """Raise ValueError for rules that do not go together, whatever the chunk."""
        if self.context == "recomputed":
            self._check_recomputed()
        if self.span is not None and (self.positions != "window" or self.limit is None or self.span < self.limit):
            raise ValueError(
                f'a span of {self.span} needs "window" positions and a window of at most {self.span} latent frames, '
                f"got {self.positions} positions and a window of {self.window}"
            )
        if self.shot_clean and self.cut_flush:
            raise ValueError(
                "shot_clean drops all but the sink, so there is nothing for cut_flush to keep: turn one of them off"
            )
        if self.leaving == "drop":
            return
        if self.limit is None:
            raise ValueError(f'leaving "{self.leaving}" needs a window that frames leave, got {ALL_FRAMES} frames')
        if self.leaving == "ema" and not self.sink:
            raise ValueError(
                'leaving "ema" folds frames into the sink, and there is none: make the sink as long as a chunk'
            )
        if self.leaving == "memory" and self.positions != "window":
            raise ValueError(
                'leaving "memory" needs "window" positions: its two frames have no place of their own in the video'
            )
        if self.switch in ("flush", "cut"):
            raise ValueError(
                f'a "{self.switch}" at a prompt switch cannot go with leaving "{self.leaving}": it keeps single frames, '
                'not what has been averaged into others; choose "hold", "joint" or "causal"'
            )

    def _check_recomputed(self) -> None:
        if self.limit is None:
            raise ValueError(
                f'context "recomputed" needs a window: {ALL_FRAMES} frames would all be computed anew before every chunk'
            )
        if self.sink > 1:
            raise ValueError(
                f'context "recomputed" keeps the first latent frame or none: make the sink 0 or 1, not {self.sink}'
            )
        if self.leaving != "drop":
            raise ValueError(
                f'context "recomputed" keeps no keys that leaving "{self.leaving}" could average: choose "drop", or the '
                'context "kept"'
            )
        if self.switch != "hold":
            raise ValueError(
                f'a "{self.switch}" at a prompt switch cannot go with the context "recomputed", which is computed anew '
                'before every chunk anyway: choose "hold", or the context "kept"'
            )

    def with_rules(self, **chosen: Any) -> CacheConfig:
        """These settings with some chosen anew. A span belongs to the positions that it came with, and goes with them."""
        return replace(self, **({"span": None} if "positions" in chosen else {}) | chosen)

    @property
    def limit(self) -> int | None:
        """The window in latent frames; None where it is unlimited."""
        return None if self.window == ALL_FRAMES else self.window

    @property
    def unlimited(self) -> bool:
        """Whether every frame is kept."""
        return self.limit is None

    @property
    def held(self) -> int:
        """Latent frames at the front of the window that never make room: the sink, and the two frames of a memory."""
        return self.sink + 2 * (self.leaving == "memory")

    def check_switch(self, switch: str) -> None:
        """Raise ValueError unless prompts can be switched so under these rules."""
        check_choice("the prompt switch", switch, SWITCHES)
        replace(self, switch=switch)

    def check_chunk(self, chunk: int) -> None:
        """Raise ValueError unless the window holds the sink and one chunk of `chunk` latent frames, and its rules fit both."""
        if self.limit is None:
            return
        if self.context == "recomputed":
            _check_context(self.limit, chunk)
        if self.limit < self.held + chunk:
            memory = " and the memory (2)" if self.leaving == "memory" else ""
            raise ValueError(
                f"a window of {self.window} latent frames cannot hold the sink ({self.sink}){memory} and a chunk ({chunk}): "
                f"make the window at least {self.held + chunk}, or the sink smaller"
            )
        if self.leaving == "ema":
            if self.sink != chunk:
                raise ValueError(
                    f'leaving "ema" folds a chunk into a sink of the same size, but the sink is {self.sink} latent frames '
                    f"and a chunk is {chunk}: make the sink {chunk}"
                )
            if self.limit % chunk:
                lower = max(self.limit // chunk, 2) * chunk
                raise ValueError(
                    f'leaving "ema" folds whole chunks of {chunk} latent frames, which a window of {self.limit} does not '
                    f"hold: the nearest windows are {lower} and {lower + chunk}"
                )


def _check_context(window: int, chunk: int) -> None:
    """Raise ValueError unless whole chunks, of 2 frames or more, are in view beside the one being made."""
    least = max(2 * chunk, chunk + 2)
    if window % chunk or window < least:
        lower = max(window // chunk, -(-least // chunk)) * chunk
        raise ValueError(
            f'context "recomputed" sees whole chunks of {chunk} latent frames, at least {least - chunk} frames beside the '
            f"chunk being made, which a window of {window} does not: the nearest windows are {lower} and {lower + chunk}"
        )


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


@dataclass(frozen=True)
class ExecutionConfig:
    """How passes are computed: what changes their speed and their rounding, but not what a model was trained for.

    exact: rotate in float64, and keep the original code's order of operations: bit-equal to it in float32. Off: float32
        rotation and fused operations, which agree to rounding and are faster.
    backend: attention backend of diffusers' dispatcher, one of ATTENTION_BACKENDS; None: its default, SDPA.
    compile: run the blocks through torch.compile. What changes from chunk to chunk (the cache's indices, the number of
        keys) stays outside the compiled parts, so a session compiles once per chunk size.
    cuda_graphs: once the window is full, record passes as CUDA graphs and repeat them; see `wan.graphs`.
    """

    exact: bool = field(
        default=False, metadata={"help": "rotate in float64 and keep the original code's order of operations; slower"}
    )
    backend: str | None = field(
        default=None,
        metadata={"help": "attention kernel (default: PyTorch's own choice)", "choices": ATTENTION_BACKENDS},
    )
    compile: bool = field(default=False, metadata={"help": "run the blocks through torch.compile"})
    cuda_graphs: bool = field(
        default=False, metadata={"help": "record passes as CUDA graphs and repeat them (not tried on a GPU yet)"}
    )

    def describe(self) -> list[str]:
        """What is not the default, as phrases for people."""
        phrases = {"exact": "exact", "compile": "compiled", "cuda_graphs": "CUDA graphs"}
        chosen = [phrase for name, phrase in phrases.items() if getattr(self, name)]
        return chosen + ([f"attention by {self.backend}"] if self.backend else [])

    def check(
        self,
        device: torch.device | str | None = None,
        *,
        weight_storage: str = "model",
        packings: Collection[str] = (),
        step_cache: bool = False,
        ranks: int = 1,
    ) -> None:
        """Raise ValueError unless these settings go together, and with what they are going to run on.

        device: where the model computes; None: not known yet. weight_storage: one of WEIGHT_STORAGES. packings: of
        weights from a GGUF file, as `checkpoints.gguf.gguf_types` names them. step_cache: whether there is one. ranks:
        processes that share a video.
        """
        if ranks > 1 and step_cache:
            raise ValueError(
                "a step cache judges by what one process sees, and those that share a video have to do the same: leave the "
                "step cache out, or make the video in one process"
            )
        if ranks > 1 and self.cuda_graphs:
            raise ValueError("CUDA graphs are for passes of one process: turn them off where several share a video")
        check_choice("the weight storage", weight_storage, WEIGHT_STORAGES)
        if self.backend is not None:
            check_choice("the attention backend", self.backend, ATTENTION_BACKENDS)
            try:
                _check_attention_backend_requirements(AttentionBackendName(self.backend))
            except RuntimeError as error:
                raise ValueError(f"the attention backend {self.backend} is not installed here: {error}") from error
            if self.backend != ANY_DEVICE_BACKEND and device is not None and torch.device(device).type != "cuda":
                raise ValueError(
                    f"the attention backend {self.backend} needs a CUDA GPU, but the model is on {device}: choose "
                    f"{ANY_DEVICE_BACKEND}, or leave the choice to PyTorch"
                )
        if self.exact and device is not None and not has_float64(torch.device(device)):
            raise ValueError(f"exact passes rotate in float64, which {device} does not have: turn exact off")
        if weight_storage != "model" and packings:
            raise ValueError(
                f'a GGUF file keeps its own packing: set the weight storage to "model" instead of "{weight_storage}"'
            )
        if self.compile and weight_storage == "float8":
            raise ValueError(
                "weights in float8 cannot go with compile: each layer is widened outside of the compiled code, which "
                'cuts it into pieces that bring nothing. Turn compile off, or set the weight storage to "model"; the '
                "weights of a GGUF file are small and can be compiled."
            )
        if self.compile and step_cache:
            raise ValueError("a step cache cannot go with compiled blocks: turn compile off, or remove the step cache")
        if self.cuda_graphs:
            self._check_cuda_graphs(device, weight_storage, packings, step_cache)

    def _check_cuda_graphs(self, device, weight_storage: str, packings: Collection[str], step_cache: bool) -> None:
        if step_cache:
            raise ValueError("a step cache cannot go with CUDA graphs: turn them off, or remove the step cache")
        if device is not None and torch.device(device).type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, but the model is on {device}: turn them off")
        if weight_storage == "float8":
            raise ValueError(
                "weights in float8 cannot go with CUDA graphs: each layer's weights move when it runs, and a graph "
                'would go on reading the old place. Turn CUDA graphs off, or set the weight storage to "model".'
            )
        waiting = [packing for packing in packings if packing not in RECORDABLE_PACKINGS]
        if waiting:
            raise ValueError(
                f"weights packed as {', '.join(waiting)} cannot go with CUDA graphs: unpacking them copies small tables "
                "from the CPU, which cannot be recorded. Turn CUDA graphs off, or use a GGUF file in Q8_0."
            )
