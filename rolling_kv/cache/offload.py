"""Where an offloaded cache keeps its bytes: in CPU memory, copied to the device one layer ahead."""

from __future__ import annotations

import math
from typing import Any

import torch

from .codecs import Parts
from .pinned import HostMemory, check_room
from .stores import Resident, Sizes, nbytes_of


class Copies:
    """Copies between staging buffers and CPU memory, done one after the other in the order they are asked for."""

    def share(self, parts: Parts) -> None:
        """These tensors are going to be copied to and from. To be called once for each, when it is new."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy [2, B, S, …], after everything that has been asked of the device so far."""
        to.copy_(source)

    def mark(self):
        """The copies up to now, for `wait`."""

    def wait(self, mark) -> None:
        """Whatever is asked of the device from now on sees the copies up to `mark`."""

    def finish(self) -> None:
        """Return when every copy is done, so that the CPU can read and write the same memory."""


class StreamCopies(Copies):
    """On a CUDA stream of its own, so that copies run beside what is being computed."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def share(self, parts):
        # Allocated for the computation's stream: without this, memory that is let go of while a copy still runs would
        # be handed out again under it.
        for part in parts:
            part.record_stream(self.stream)

    def copy(self, to, source):
        self.stream.wait_stream(self._computation())
        with torch.cuda.stream(self.stream):
            # Row by row: only contiguous memory is copied asynchronously.
            for pair in zip(to.flatten(0, 1), source.flatten(0, 1)):
                pair[0].copy_(pair[1], non_blocking=True)

    def mark(self):
        return self.stream.record_event()

    def wait(self, mark):
        self._computation().wait_event(mark)

    def finish(self):
        self.stream.synchronize()

    def _computation(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.stream.device)


class Offloaded(Resident):
    """Every layer's parts in CPU memory (see `pinned`), two layers' worth on the device.

    While one layer computes, the next one is copied in; what a pass writes is copied back. Layers are best opened in
    order, 0 to the last, over and over: another order costs a wait.

    layers: number of transformer layers.
    sizes: shape and dtype of each part of a layer.
    device: where the model computes.

    Raises ValueError when there is too little RAM.
    """

    def __init__(self, layers: int, sizes: Sizes, device: torch.device):
        check_room(layers * _bytes_of(sizes))
        self.memory = HostMemory(device)
        super().__init__(layers, sizes, torch.device("cpu"))
        self.staging = Resident(2, sizes, device)
        self.copies = StreamCopies(device) if device.type == "cuda" else Copies()
        self._forget_staging()

    def _allocate(self, sizes: Sizes) -> Parts:
        return tuple(self.memory.zeros(size, dtype) for size, dtype in sizes)

    def _forget_staging(self) -> None:
        for parts in self.staging.layers:
            self.copies.share(parts)
        self.discard()

    @property
    def device_bytes(self) -> int:
        return self.staging.device_bytes

    @property
    def host_bytes(self) -> int:
        return nbytes_of(self.layers)

    def resize(self, sizes: Sizes, used: int) -> None:
        check_room(len(self.layers) * _bytes_of(sizes) - self.host_bytes + nbytes_of(self.layers[:1]))
        self.copies.finish()  # the CPU moves what they may still be bringing back
        super().resize(sizes, used)
        self.staging.resize(sizes, 0)
        self._forget_staging()

    def copied(self, parts: Parts) -> Parts:
        copies = self._allocate([(part.shape, part.dtype) for part in parts])
        for copy, part in zip(copies, parts):
            copy.copy_(part, non_blocking=True)
        return copies

    def finish(self) -> None:
        self.copies.finish()

    def open(self, layer: int, tokens: int) -> Parts:
        self.place = place = 1 - self.place
        if self.staged[place] != layer:
            self._copy_in(layer, place, tokens)
        self.copies.wait(self.arrived[place])
        if len(self.layers) > 1:
            # The other buffer was last read by the layer before this one, whose work is already queued.
            self._copy_in((layer + 1) % len(self.layers), 1 - place, tokens)
        else:
            self.staged[1 - place] = -1
        return self.staging.layers[place]

    def close(self, layer: int, written: list[tuple[int, int]]) -> None:
        for staged, kept in zip(self.staging.layers[self.place], self.layers[layer]):
            for first, count in written:
                self.copies.copy(kept[:, :, first : first + count], staged[:, :, first : first + count])

    def discard(self) -> None:
        self.staged = [-1, -1]  # which layer each staging buffer holds, or is about to hold
        self.arrived: list[Any] = [None, None]  # the mark after its copy
        self.place = 0  # the staging buffer that is open

    def release(self) -> None:
        try:
            self.copies.finish()  # they still read and write this memory
        finally:
            super().release()
            self.staging.release()

    def _copy_in(self, layer: int, place: int, tokens: int) -> None:
        for staged, kept in zip(self.staging.layers[place], self.layers[layer]):
            self.copies.copy(staged[:, :, :tokens], kept[:, :, :tokens])
        self.staged[place] = layer
        self.arrived[place] = self.copies.mark()


def _bytes_of(sizes: Sizes) -> int:
    return sum(math.prod(size) * dtype.itemsize for size, dtype in sizes)
