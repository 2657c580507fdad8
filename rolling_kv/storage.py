"""How a cache keeps its bytes: in the model's dtype, float8 or int8; on the compute device, or in CPU memory.

Whatever the form, only one layer at a time is read back into the model's dtype, never the whole cache.
"""

from __future__ import annotations

import math

import torch

from .host_memory import HostMemory, check_room

Parts = tuple[torch.Tensor, ...]
"""The tensors that together hold some keys or values: the codes, and with int8 their scales. [..., S, H, ·] each."""


class ModelDtype:
    """Keeps what it is given. Reading gives views, not copies."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def widths(self, head_dim: int) -> list[tuple[int, torch.dtype]]:
        """Trailing size and dtype of each part."""
        return [(head_dim, self.dtype)]

    def bytes_per_head(self, head_dim: int) -> int:
        """Bytes that one key or one value of one head takes."""
        return sum(width * dtype.itemsize for width, dtype in self.widths(head_dim))

    def unpack_bytes(self, head_dim: int) -> int:
        """Bytes of the copy that `unpack` makes of one key or one value of one head."""
        return 0

    def pack(self, x: torch.Tensor) -> Parts:
        return (x,)

    def unpack(self, parts: Parts) -> torch.Tensor:
        return parts[0]


class Float8(ModelDtype):
    """float8_e4m3fn: half the bytes of bfloat16, 3 bits of mantissa. Keys are normalised, so no scale is needed."""

    limit = torch.finfo(torch.float8_e4m3fn).max

    def widths(self, head_dim):
        return [(head_dim, torch.float8_e4m3fn)]

    def unpack_bytes(self, head_dim):
        return head_dim * self.dtype.itemsize

    def pack(self, x):
        return (x.clamp(-self.limit, self.limit).to(torch.float8_e4m3fn),)

    def unpack(self, parts):
        return parts[0].to(self.dtype)


class Int8(ModelDtype):
    """int8 with a float32 scale per token and head: about half the bytes of bfloat16, and a fraction of float8's error."""

    def widths(self, head_dim):
        return [(head_dim, torch.int8), (1, torch.float32)]

    def unpack_bytes(self, head_dim):
        return head_dim * self.dtype.itemsize

    def pack(self, x):
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (x / scale).round().to(torch.int8), scale

    def unpack(self, parts):
        codes, scale = parts
        # The product is float32 and rounded as it is stored: a GPU makes no float32 copy.
        return torch.mul(codes, scale, out=torch.empty_like(codes, dtype=self.dtype))


CODECS = {"model": ModelDtype, "float8": Float8, "int8": Int8}


Sizes = list[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each part of a layer, [2 (keys, values), B, S, H, ·]."""


class Resident:
    """Every layer's parts on one device."""

    def __init__(self, layers: int, sizes: Sizes, device: torch.device):
        self.device = device
        self.layers = [self._allocate(sizes) for _ in range(layers)]

    def _allocate(self, sizes: Sizes) -> Parts:
        return tuple(torch.zeros(size, dtype=dtype, device=self.device) for size, dtype in sizes)

    @property
    def device_bytes(self) -> int:
        """Bytes on the compute device."""
        return _nbytes(self.layers)

    @property
    def host_bytes(self) -> int:
        """Bytes in CPU memory beside those."""
        return 0

    def resize(self, sizes: Sizes, used: int) -> None:
        """Move to parts of other sizes, keeping the first `used` tokens. Old and new coexist for one layer at a time."""
        for index, old in enumerate(self.layers):
            new = self._allocate(sizes)
            for source, target in zip(old, new):
                target[:, :, :used] = source[:, :, :used]
            self.layers[index] = new

    def open(self, layer: int, tokens: int) -> Parts:
        """The parts of a layer, of which the first `tokens` tokens are going to be read; writable until `close`."""
        return self.layers[layer]

    def close(self, layer: int, written: list[tuple[int, int]]) -> None:
        """What was written in the opened parts: (first token, count) each."""

    def aside(self, parts: Parts) -> Parts:
        """A copy of parts of an open layer, for as long as the caller wants it, where this store keeps its own."""
        return tuple(part.clone() for part in parts)

    def discard(self) -> None:
        """Forget what is on its way: the next pass starts at the first layer again."""

    def release(self) -> None:
        """Let go of the parts."""
        self.layers.clear()


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
    """Every layer's parts in CPU memory (see `host_memory`), two layers' worth on the device.

    While one layer computes, the next one is copied in; what a pass writes is copied back. Layers are best opened in
    order, 0 to the last, over and over: another order costs a wait. Raises ValueError when there is too little RAM.
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
        return _nbytes(self.layers)

    def resize(self, sizes: Sizes, used: int) -> None:
        check_room(len(self.layers) * _bytes_of(sizes) - self.host_bytes + _nbytes(self.layers[:1]))
        self.copies.finish()  # the CPU moves what they may still be bringing back
        super().resize(sizes, used)
        self.staging.resize(sizes, 0)
        self._forget_staging()

    def aside(self, parts: Parts) -> Parts:
        copies = self._allocate([(part.shape, part.dtype) for part in parts])
        for copy, part in zip(copies, parts):
            copy.copy_(part, non_blocking=True)
        return copies

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
        self.arrived = [None, None]  # the mark after its copy
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


def _nbytes(layers: list[Parts]) -> int:
    return sum(part.nbytes for parts in layers for part in parts)
