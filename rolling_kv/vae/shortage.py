"""What people are told when decoding has used up the memory."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..devices import OutOfMemory, is_out_of_memory, obtainable_memory
from .loading import AnyVAE
from .taehv import TinyVAE


@contextmanager
def telling_decoding_shortage(vae: AnyVAE, height: int, width: int, *remedies: str) -> Iterator[None]:
    """Turns an error of the allocator from inside into OutOfMemory. remedies: what else a person can do, each as a command."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device = vae.compute_device()
        takes = vae.decode_bytes(height, width)
        room = obtainable_memory(device)
        tiny = [] if isinstance(vae, TinyVAE) else ["load a tiny decoder, taew2_1, in the place of the VAE"]
        traceback.clear_frames(error.__traceback__)  # they refer to the features
        raise OutOfMemory(
            f"the memory of {device} is used up: decoding {width}x{height} takes about {takes / 2**30:.1f} GiB there beside the "
            f"weights, of {room / 2**30:.1f} GiB that can be had. What helps: {'; '.join([*tiny, *remedies])}"
        ) from error
