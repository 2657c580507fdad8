"""What a rolling cache keeps, and by which rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from ..cache.codecs import CODECS
from ..messages import shown
from .checks import check_choice, check_flag, check_real, check_whole

ALL_FRAMES: Final = "all"
"""A window that keeps every frame."""
MOST_FRAMES = 4096
"""Latent frames of a window: more than any memory holds at 480p."""

POSITIONS = ("absolute", "window")
LEAVING = ("drop", "ema", "memory")
ACCUMULATION = ("float32", "model")
SWITCHES = ("hold", "joint", "causal", "flush", "cut")
CONTEXTS = ("kept", "recomputed")
CACHE_STORAGES = tuple(CODECS)


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
