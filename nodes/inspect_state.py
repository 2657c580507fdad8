from dataclasses import replace

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..rolling_kv.planning import window_after
from ..rolling_kv.sampling.memory import estimate
from ..rolling_kv.sampling.state import CacheState
from ..rolling_kv.sampling.summary import summarize
from ..rolling_kv.vae.latents import to_raw
from . import borders, run
from .guard import guarded
from .live.runs import window_of
from .types import CATEGORY, VAE, Model, ModelHandle, State

SHOWN = 4
"""Latent frames at the end of a video of which the last picture is shown each: a quarter of a second apart."""
WARM_UP = 2
"""Latent frames before them, which are decoded for what follows."""
HIGHEST = 160
"""Pixels of a picture in the strip."""


class RollingKVInspectState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVInspectState",
            display_name="Inspect State",
            category=CATEGORY,
            description=(
                "Shows what a state is: how long, how large, and which prompt, seed and switch made which part of the video. "
                "With a model connected also the rules by which it goes on, with a VAE the last frames."
            ),
            search_aliases=["state info", "cache info", "show state", "debug", "metadata"],
            inputs=[
                State.Input("state", tooltip="From Sample Video, Stream Video or Load State."),
                Model.Input(
                    "model", optional=True, tooltip="That is to go on: shows its window, sink and other rules."
                ),
                VAE.Input("vae", optional=True, tooltip="From Load Streaming VAE: shows the last frames."),
            ],
            outputs=[
                io.String.Output(
                    display_name="table", tooltip="What is shown as Markdown, for Preview as Text or a file."
                ),
                io.Image.Output(
                    display_name="last_frames", tooltip="The strip with the end of the video. Only with a VAE."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @guarded
    def execute(cls, state, model=None, vae=None) -> io.NodeOutput:
        info = summarize(state)
        facts = info.facts() | ({} if model is None else {"rules": _rules(state, model)})
        text = "  \n".join(f"{name}: {said}" for name, said in facts.items()) + f"\n\n{info.markdown()}"
        shown = {"text": (text,), "window": () if model is None else _window(state, model)}
        if vae is None:
            nothing = ExecutionBlocker("Inspect State shows the last frames only where a VAE is connected to it.")
            return io.NodeOutput(text, nothing, ui=shown)
        strip = _strip(state, vae, cls.hidden.unique_id)
        return io.NodeOutput(text, strip, ui=ui.PreviewImage(strip).as_dict() | shown)


def _rules(state: CacheState, model: ModelHandle) -> str:
    """How a model goes on, as a phrase."""
    said = replace(model.engine.preset, cache=model.cache, sampling=model.sampling).trained_for()
    if model.patcher.identity_with(model.loras) != state.model:
        said += "; another model, precision or set of LoRAs has made this video"
    return said


def _window(state: CacheState, model: ModelHandle) -> tuple[dict, ...]:
    """What a cache of the model has to see before it goes on; nothing where its window is too small for the state's chunks."""
    try:
        window = window_after(state.records, model.cache)
    except ValueError:
        return ()
    about = {
        "sampling": model.sampling,
        "cache": model.cache,
        "batch": state.chunks[0].shape[0],
        "frames": state.frames,
    }
    needed = estimate(model.engine.transformer, *state.size, **about)
    return (window_of(window, needed.cache + needed.host, mm.get_free_memory(model.patcher.load_device)),)


def _strip(state: CacheState, vae, node_id: str) -> torch.Tensor:
    """The last pictures side by side, [1, H, W, 3]; a row for each video of a batch."""
    borders.check_vae(vae.model.geometry, state.geometry)
    latents = to_raw(state.frames_between(state.frames - SHOWN - WARM_UP, state.frames).float())
    vae.bring_to_device(vae.model.decode_bytes(*state.size, latents.shape[0]))
    pictures, count = [], latents.shape[2]
    with run.progress(node_id) as on_frame:
        for done, pixels in enumerate(vae.model.decoder().decode_frames(latents)):
            on_frame(done, count)
            if count - done <= SHOWN:
                pictures.append(_small(pixels[:, :, -1]))
    rows = torch.cat(pictures, dim=3)  # [B, 3, h, n w]
    return (torch.cat(list(rows), dim=1) * 0.5 + 0.5).movedim(0, -1).unsqueeze(0).cpu()


def _small(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W], no higher than HIGHEST."""
    height, width = pictures.shape[2:]
    if height <= HIGHEST:
        return pictures
    size = HIGHEST, max(round(width * HIGHEST / height), 1)
    return torch.nn.functional.interpolate(pictures, size, mode="area")
