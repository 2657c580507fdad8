"""What people are told when a run has used up the memory: what it takes, what there is, and the settings that would fit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import CacheConfig, SamplingConfig
from ..devices import OutOfMemory, is_out_of_memory, obtainable_memory
from ..wan.offloaded import spared_by_offloading, weight_nbytes
from .memory import OFFLOAD_WEIGHTS, STANDARD_SPEED, estimate, what_fits

_SHORT_BY = 0.9
"""Of what was expected to do: how much settings may take that are named where more was needed than expected."""


@contextmanager
def telling_shortage(
    transformer,
    height: int,
    width: int,
    *,
    device: torch.device,
    sampling: SamplingConfig,
    cache: CacheConfig,
    frames: int,
    weight_sets: int = 1,
    products: int = 0,
    decoding: int = 0,
    **others,
) -> Iterator[None]:
    """Turns an error of the allocator from inside into OutOfMemory, and gives back what the failed pass has held.

    device: where the model computes. frames: latent frames of the whole video.
    decoding: bytes that decoding takes on the device. others: as for `estimate`, and so are those not named here.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        here, spared = weight_nbytes(transformer), spared_by_offloading(transformer)
        weights = weight_sets * here

        def needed(cache: CacheConfig, frames: int = frames) -> int:
            run = estimate(
                transformer,
                height,
                width,
                sampling=sampling,
                cache=cache,
                frames=frames,
                weight_sets=weight_sets,
                products=products,
                **others,
            )
            on_cpu = run.host if device.type == "cpu" else 0
            return weights + run.device + on_cpu + decoding

        takes, room = needed(cache), obtainable_memory(device)
        budget = min(room, _SHORT_BY * takes)
        changes = [STANDARD_SPEED] if products and takes - weight_sets * products <= budget else []
        if device.type != "cpu" and spared and takes - weight_sets * (spared + products) <= budget:
            changes.append(OFFLOAD_WEIGHTS)
        remedies = what_fits(lambda *changed: needed(*changed) <= budget, sampling, cache, frames, changes)
        traceback.clear_frames(error.__traceback__)  # they refer to the activations
        raise OutOfMemory(
            f"the memory of {device} is used up: this run takes about {takes / 2**30:.1f} GiB there "
            f"({weights / 2**30:.1f} GiB of them weights), of {room / 2**30:.1f} GiB that can be had: {', '.join(remedies)}"
        ) from error
