"""Answers to pages that show a node before it runs: what a run will take, and what a schedule says."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm

from ...rolling_kv.config import SamplingConfig
from ...rolling_kv.geometry import WAN_21, Geometry
from ...rolling_kv.messages import shown
from ...rolling_kv.planning import forecast, last_window
from ...rolling_kv.schedules.timeline import shown_in_seconds
from ...rolling_kv.wan.fast import fast_for
from .. import inputs
from ..patchers import obtainable
from ..wired import SECONDS, run_of, wired
from .routes import answer_with
from .runs import window_of

LARGEST = 2**21
"""Most bytes of a request: a schedule may be long."""


def add_routes(routes) -> None:
    """Let a server answer with the functions below."""
    answer_with(routes, "schedule", schedule, LARGEST)
    answer_with(routes, "plan", plan, LARGEST)


def schedule(said: dict) -> dict[str, Any]:
    """What a text says, for the schedule editor.

    said: {"text", and "model" and "sampler" as `wired` has them, each of which may be null}. Without a model, chunks are
        those of most models: 3 latent frames at 16 frames a second.

    Returns {"canonical": the text in this project's form, "is_canonical": whether it was, "segments": [{"text", "time" in
    seconds, "how": what stands in the brackets}], "end": seconds or null, "notes": sentences, "grid": seconds at which
    chunks begin, "seconds": how long what is shown is, "preset": of the model or null}. Raises ValueError, also
    for a model that is not there.
    """
    text = said.get("text")
    if not isinstance(text, str):
        raise ValueError(f"text must be the text of a schedule, got {shown(text)}")
    sampling, geometry, preset, seconds = SamplingConfig(), WAN_21, None, None
    if said.get("model") is not None:
        made, sampling, *_ = wired(said["model"])
        geometry, preset = Geometry.of(made.transformer), made.preset.name
    if said.get("sampler") is not None:
        run = run_of(said["sampler"])
        frames = 0 if run.chunks is None else sampling.frames_of(run.chunks)
        seconds = geometry.seconds(frames) if frames else run.seconds
    return {**shown_in_seconds(text, sampling, geometry, seconds).about(), "preset": preset}


def plan(said: dict) -> dict[str, Any]:
    """What a run will take, for the cache inspector.

    said: {"model", "sampler"} as `wired` has them; without a sampler, the run is one of 832x480.

    Returns {"parts": bytes of "weights", with their copy for fast passes, "cache", "prompts", "passes", all on the device,
    and "host", in CPU memory beside it, "device": its name, "needed", "free": bytes on the device, "host_free": in CPU memory,
    "fits": whether there is room, "remedies": phrases that say what would fit, "window": as in `window_of` while the last chunk is made, "chunk":
    latent frames of one, "preset", "size": [width, height], "seconds": of the video}. Raises ValueError likewise.
    """
    made, sampling, cache, execution = wired(said.get("model"))
    run = run_of(said.get("sampler"))
    geometry = Geometry.of(made.transformer)
    sampling = inputs.with_guidance(sampling, run.guidance)
    chunks = run.chunks or sampling.chunks_for_seconds(run.seconds or SECONDS, 0, geometry)
    frames = sampling.frames_of(chunks)
    device = mm.get_torch_device()
    on_cpu = device.type == "cpu"
    room, host_room = obtainable(device), None if on_cpu else mm.get_free_memory(mm.unet_offload_device())
    known = forecast(
        made, run.height, run.width, sampling=sampling, cache=cache, frames=frames, batch=run.batch, room=room,
        host_room=host_room, fast=fast_for(execution, made.transformer, device).products,
    )  # fmt: skip
    return {
        "parts": {
            "weights": known.weights + known.run.products,
            "cache": known.run.cache,
            "prompts": known.run.prompts,
            "passes": known.run.activations,
            "host": known.run.host + known.latents + made.host_weights,
        },
        "device": str(device),
        "needed": known.device,
        "free": room,
        "host_free": host_room,
        "fits": known.fits,
        "remedies": list(known.remedies),
        "window": window_of(last_window(sampling, cache, frames), known.run.cache + known.run.host, room),
        "chunk": sampling.chunk,
        "preset": made.preset.name,
        "size": [run.width, run.height],
        "seconds": geometry.seconds(frames),
    }
