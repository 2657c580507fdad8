"""What the nodes that run a model share: room on the device, LoRAs, progress, cancel, memory given back."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
from comfy.utils import ProgressBar
from server import PromptServer

from ..rolling_kv.devices import OutOfMemory
from ..rolling_kv.sampling.memory import check_fits, estimate
from .patchers import ManagedModule
from .types import ModelHandle


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user has cancelled the run."""
    mm.throw_exception_if_processing_interrupted()


def say(text: str, node_id: str) -> None:
    """Show a line of text on the node."""
    PromptServer.instance.send_progress_text(text, node_id)


@contextmanager
def progress(node_id: str, newest: Callable[[], tuple | None] = lambda: None) -> Iterator[Callable[[int, int], None]]:
    """Gives on_pass(done, total), which shows how far a run is and ends it when the user cancels.

    newest: gives a picture to show beside it, as ComfyUI's `ProgressBar` takes it, or None where there is no new one.

    A run that fails gives back what it has held at once: its traceback still refers to the activations.
    """
    bar = ProgressBar(1, node_id=node_id)

    def on_pass(done: int, total: int) -> None:
        check_cancelled()
        bar.update_absolute(done, total, newest())

    try:
        yield on_pass
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, OutOfMemory):  # as ComfyUI does after the error that this one stands for
            mm.unload_all_models()
        mm.soft_empty_cache()
        raise
    bar.update_absolute(bar.total, preview=newest())


def bring_to_device(model: ModelHandle, nbytes: int, *others: ManagedModule) -> None:
    """Load the weights with their LoRAs, and others beside them, making room for a run of `nbytes`."""
    model.patcher.bring_to_device(nbytes + model.patcher.lora_bytes(model.loras), *others)
    model.patcher.use_loras(model.loras)


def decoding_bytes(
    height: int, width: int, batch: int, vae: ManagedModule | None, decoder: ManagedModule | None
) -> int:
    """Bytes that the VAEs of a session take on the device. vae, decoder: see `make_room`."""
    taken = 0
    if vae is not None:
        taken += vae.model.decode_bytes(height, width, batch) + vae.model.encode_bytes(height, width, batch)
    if decoder is not None:
        taken += decoder.model.decode_bytes(height, width, batch)
    return taken


def make_room(
    model: ModelHandle,
    *,
    height: int,
    width: int,
    session: dict[str, Any],
    vae: ManagedModule | None,
    decoder: ManagedModule | None = None,
    standing: bool = False,
) -> None:
    """Bring a model to the device with room for a session.

    session: what `estimate` is to know of it.
    vae: what the session takes frames through. decoder: what decodes its chunks meanwhile. Both come to the device too.
    standing: the session is open, so that its cache has its room.

    The working cache of the last run, which this one takes over or takes the place of, is not counted twice. Raises
    ValueError, with settings that would fit, if the session needs more RAM than there is.
    """
    transformer, workspace = model.engine.transformer, model.patcher.workspace
    device = model.patcher.load_device
    beside = decoding_bytes(height, width, session["batch"], vae, decoder)
    needed = estimate(transformer, height, width, **session)
    kept = needed.cache + needed.prompts
    room = 0
    if not standing:
        held = workspace.host_nbytes + (workspace.device_nbytes if device.type == "cpu" else 0)
        check_fits(transformer, height, width, **session, device=device, held=held, decoding=beside)
        room = max(kept - workspace.device_nbytes, 0)
    others = {id(other): other for other in (vae, decoder) if other is not None}.values()
    bring_to_device(model, room + needed.device - kept + beside, *others)
