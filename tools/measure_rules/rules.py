"""The rules that are measured: how a family has them, and how they fit the bundled model, whose window is 9 latent frames."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.presets import PRESETS, ModelPreset

_SELF_FORCING = PRESETS["self-forcing"]
_INFINITY = ModelPreset(
    "infinity-rope",
    _SELF_FORCING.sampling,
    CacheConfig(6, sink=1, positions="window", switch="flush"),
    source="https://arxiv.org/abs/2511.20649",
)
_CHUNKWISE = SamplingConfig()


@dataclass(frozen=True)
class Method:
    """A way to make videos longer than those of the training.

    name: in tables and of records.
    says: what it does, in a sentence.
    real: how a family has it, for the cost and the source.
    cache, sampling: the same for the bundled model.
    minutes: whether five minutes are measured too.
    """

    name: str
    says: str
    real: ModelPreset
    cache: CacheConfig
    sampling: SamplingConfig = _CHUNKWISE
    minutes: bool = False


METHODS = (
    Method(
        "plain window",
        "Frames that leave the window are forgotten.",
        _SELF_FORCING,
        CacheConfig(9),
        minutes=True,
    ),
    Method(
        "absolute sink",
        "The video's first frames stay, at their own place in time, which recedes.",
        PRESETS["longlive"],
        CacheConfig(9, sink=3),
        minutes=True,
    ),
    Method(
        "window positions",
        "The first frames stay, and are moved in time to just before the rest.",
        PRESETS["longlive-infinity"],
        CacheConfig(9, sink=3, positions="window"),
        minutes=True,
    ),
    Method(
        "deep sink",
        "The same with a sink of half the window.",
        PRESETS["deep-sink"],
        CacheConfig(9, sink=4, positions="window"),
        minutes=True,
    ),
    Method(
        "EMA 0.999",
        "Chunks that leave are folded into the sink, a moving average that keeps 0.999 of itself.",
        PRESETS["reward-forcing"],
        CacheConfig(9, sink=3, positions="window", leaving="ema"),
        minutes=True,
    ),
    Method(
        "EMA 0.9",
        "The same, keeping 0.9.",
        replace(PRESETS["reward-forcing"], cache=replace(PRESETS["reward-forcing"].cache, ema_alpha=0.9)),
        CacheConfig(9, sink=3, positions="window", leaving="ema", ema_alpha=0.9),
    ),
    Method(
        "MemRoPE",
        "What leaves is averaged into two frames behind the sink, a slow and a fast one.",
        PRESETS["memrope"],
        CacheConfig(9, sink=1, positions="window", leaving="memory"),
        minutes=True,
    ),
    Method(
        "Infinity-RoPE",
        "The first frame, the last two and the new chunk are all that a pass sees.",
        _INFINITY,
        _INFINITY.cache,
    ),
    Method(
        "span",
        "Window positions that run on to the end of the trained frames, with a gap behind the sink.",
        PRESETS["self-gradient-forcing-chunkwise"],
        CacheConfig(9, sink=3, positions="window", span=12),
    ),
    Method(
        "rolling",
        "As many chunks as there are steps are denoised together, each a step behind the one before.",
        PRESETS["rolling-forcing"],
        CacheConfig(18, sink=3),
        SamplingConfig(sampler="rolling"),
    ),
    Method(
        "recomputed",
        "The frames in view are computed anew before every chunk.",
        PRESETS["krea-realtime"],
        CacheConfig(9, positions="window", context="recomputed"),
    ),
)


@dataclass(frozen=True)
class Switch:
    """A way to change the prompt. name: in tables and of records. switch, blend: as `RollingSession.set_prompt` takes them."""

    name: str
    cache: CacheConfig
    switch: str
    blend: int = 1


_PLAIN = CacheConfig(9)
_SINK = CacheConfig(9, sink=3)

SWITCHES = (
    Switch("hold", _PLAIN, "hold"),
    Switch("blend over 3 chunks", _PLAIN, "hold", blend=3),
    Switch("joint", _PLAIN, "joint"),
    Switch("causal", _PLAIN, "causal"),
    Switch("hold, sink 3", _SINK, "hold"),
    Switch("joint, sink 3 kept", _SINK, "joint"),
    Switch("joint, sink 3 new", replace(_SINK, global_sink=False), "joint"),
    Switch("flush as Infinity-RoPE", _INFINITY.cache, "flush"),
    Switch("cut as Infinity-RoPE", _INFINITY.cache, "cut"),
    Switch("cut as LongLive 2", replace(_SINK, cut_flush=False, cut_offset=8, shot_sink=True), "cut"),
)
