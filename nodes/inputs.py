"""Widgets that more than one node has, each written once, and what their choices mean to the engine.

Where a setting may be left to the model, a choice says so; no number stands for it.
"""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..rolling_kv.config import ALL_FRAMES, CacheConfig, SamplingConfig
from ..rolling_kv.geometry import WAN_21, WAN_22, Geometry

OWN = "the model's own"
"""The choice that leaves a setting as the model was trained."""

OFF = "off"
EVERY_FRAME = "all frames"
SO_MANY_FRAMES = "this many frames"
SO_MANY = "this many"
THIS_STRENGTH = "this strength"
SIDES = {"width": 832, "height": 480}


def choice(
    name: str, options: dict[str, list], tooltip: str, *, optional=False, advanced=False
) -> io.DynamicCombo.Input:
    """A combo whose choices may bring inputs of their own. options: those inputs by choice, the default first."""
    return io.DynamicCombo.Input(
        name,
        options=[io.DynamicCombo.Option(key, inputs) for key, inputs in options.items()],
        optional=optional,
        tooltip=tooltip,
        extra_dict={"advanced": True} if advanced else None,
    )


def side(name: str, tooltip: str) -> io.Int.Input:
    """Width or height in pixels. tooltip: what else is to be said of it."""
    multiple = f"Pixels, a multiple of {WAN_21.multiple} (of {WAN_22.multiple} for {WAN_22.name})."
    tooltip = f"{multiple} {tooltip}".rstrip()
    return io.Int.Input(name, default=SIDES[name], min=16, max=8192, step=16, tooltip=tooltip)


def dtype(tooltip: str) -> io.Combo.Input:
    """The precision of weights."""
    return io.Combo.Input(
        "dtype", options=["auto", "bfloat16", "float16", "float32"], optional=True, advanced=True, tooltip=tooltip
    )


def window() -> io.DynamicCombo.Input:
    frames = io.Int.Input(
        "frames",
        default=21,
        min=1,
        max=4096,
        tooltip="Latent frames that a chunk attends to, counting the sink and the chunk itself.",
    )
    return choice(
        "window",
        {OWN: [], SO_MANY_FRAMES: [frames], EVERY_FRAME: []},
        "How much of the video a chunk attends to, in latent frames (4 video frames each). With all frames, memory grows "
        "with the video.",
    )


def sink() -> io.DynamicCombo.Input:
    frames = io.Int.Input(
        "frames", default=3, min=0, max=64, tooltip="Latent frames from the start of the video that are always kept."
    )
    return choice(
        "sink",
        {OWN: [], SO_MANY_FRAMES: [frames]},
        "The first latent frames of the video, which never leave the window. Avoids the flicker when frame 0 would leave.",
    )


def guidance(*, advanced: bool) -> io.DynamicCombo.Input:
    strength = io.Float.Input(
        "strength", default=3.0, min=0.0, max=30.0, step=0.1, tooltip="How strongly the prompt is followed. 1 is off."
    )
    return choice(
        "guidance",
        {OWN: [], OFF: [], THIS_STRENGTH: [strength]},
        "Classifier-free guidance. Off is right for distilled few-step models. A strength needs a negative prompt, twice "
        "the time and twice the cache.",
        optional=True,
        advanced=advanced,
    )


def fps() -> io.DynamicCombo.Input:
    rate = io.Float.Input("rate", default=16.0, min=1.0, max=120.0, step=1.0, tooltip="Frames per second of the file.")
    return choice(
        "fps",
        {OWN: [], SO_MANY: [rate]},
        "Frames per second of the file. The models make 16, those with the latents of Wan 2.2 5B 24; another number changes "
        "the speed, not the motion.",
        optional=True,
        advanced=True,
    )


def with_window(cache: CacheConfig, chosen: dict) -> CacheConfig:
    """The cache settings with what `window` gives."""
    windows = {OWN: cache.window, SO_MANY_FRAMES: chosen.get("frames"), EVERY_FRAME: ALL_FRAMES}
    return replace(cache, window=windows[chosen["window"]])


def with_sink(cache: CacheConfig, chosen: dict) -> CacheConfig:
    """The cache settings with what `sink` gives."""
    return replace(cache, sink=chosen.get("frames", cache.sink))


def with_guidance(sampling: SamplingConfig, chosen: dict | None) -> SamplingConfig:
    """The sampling settings with what `guidance` gives, None where it was left out."""
    chosen = chosen or {"guidance": OWN}
    scales = {OWN: sampling.guidance_scale, OFF: 1.0, THIS_STRENGTH: chosen.get("strength")}
    return replace(sampling, guidance_scale=scales[chosen["guidance"]])


def fps_of(geometry: Geometry, chosen: dict | None) -> float:
    """The rate that `fps` gives for a model of that geometry, None where it was left out."""
    return (chosen or {}).get("rate", geometry.fps)
