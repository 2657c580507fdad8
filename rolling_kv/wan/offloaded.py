"""Blocks whose weights lie in CPU memory, and come to the device one ahead of the block that computes.

Two blocks' worth of them are on the device at any time, in memory that stays where it is. They come and go around each call
of a block, whatever its `forward` is by then: processors, fused blocks, LoRAs and step caches find them in their places. While
a rolling cache is attached, they come around its own forward of a block, which a step cache leaves out where it skips the block.
diffusers' own group offloading takes everything outside of the blocks away between two passes as well, waits for the device
after every block, and expects all blocks in the order of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache.offload import Copies, StreamCopies
from ..cache.pinned import HostMemory

ALIGNED = 256
"""Bytes: a weight begins at a multiple of it, as the allocator of CUDA has it."""
PLACES = 2
"""Blocks on the device: the one that computes, and the one that is on its way."""


class Place(NamedTuple):
    """Where a module keeps a tensor. table: its parameters or its buffers."""

    table: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor:
        return self.table[self.name]


class Packed(NamedTuple):
    """The tensors of a block side by side in CPU memory.

    places: of the tensors in the block's modules. tensors: what stands there while the block does not run.
    memory: bytes [n]. offsets: where each begins. addresses: of the tensors, which tell whether somebody has changed one.
    """

    places: list[Place]
    tensors: list[Tensor]
    memory: Tensor
    offsets: list[int]
    addresses: list[int]


class OffloadedBlocks:
    """Keeps the weights of a transformer's blocks in CPU memory (page-locked for CUDA), until `remove`.

    A block whose weights somebody has exchanged, as LoRAs do, is packed anew before it runs. Blocks are best called in
    order, 0 to the last, over and over: another order costs a wait. Made by `offload_blocks`; one per transformer.

    device: where the blocks compute.
    by_forwards: whether forwards of `arriving` have the weights come, and calls of the blocks alone do not.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        self.device = device
        self.by_forwards = False
        self.copies = StreamCopies(device) if device.type == "cuda" else Copies()
        self._blocks = list(blocks)
        self._memory = HostMemory(device)
        self._packed: list[Packed] = []
        self._handles: list[Any] = []
        self._running: int | None = None
        self.release()
        self._packed = [_pack(block, self._memory) for block in self._blocks]
        for layer, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_pre_hook(_Arrival(self, layer)))
            self._handles.append(block.register_forward_hook(_Departure(self, layer), always_call=True))

    @property
    def device_nbytes(self) -> int:
        """Bytes on the device while passes run."""
        return PLACES * max(len(packed.memory) for packed in self._packed)

    @property
    def host_nbytes(self) -> int:
        """Bytes in CPU memory."""
        return sum(len(packed.memory) for packed in self._packed)

    def prepare(self) -> None:
        """Take the memory on the device, as the first pass does else."""
        needed = self.device_nbytes // PLACES
        if not self._buffers or len(self._buffers[0]) < needed:
            self.copies.finish()
            self._buffers = [torch.empty(needed, dtype=torch.uint8, device=self.device) for _ in range(PLACES)]
            self.copies.share(tuple(self._buffers))
            self.forget()

    def release(self) -> None:
        """Give back the memory on the device; the next pass takes it again."""
        self._depart()
        self.copies.finish()
        self._buffers: list[Tensor] = []
        self.forget()

    def remove(self) -> None:
        """Leave the weights in CPU memory as those of an ordinary transformer. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self.release()

    def arriving(self, layer: int, forward: Callable) -> Callable:
        """A block's forward that has its weights come first, until `remove`."""

        def arriving(*args, **kwargs):
            if self._handles:
                self.arrive(layer)
            return forward(*args, **kwargs)

        return arriving

    def arrive(self, layer: int) -> None:
        """Put the weights of a block, which is about to run, into its modules, and have those of the next one come."""
        self._depart()
        following = (layer + 1) % len(self._blocks)
        self._check(layer)
        if following not in self._staged:
            self._check(following)  # first: where it has become larger, both need other memory
        if layer not in self._staged:
            self._bring(layer, 0)
        place = self._staged.index(layer)
        self.copies.wait(self._arrived[place])
        if following not in self._staged:
            # The other buffer was last read by a block whose work is already queued.
            self._bring(following, 1 - place)
        packed = self._packed[layer]
        for where, stored, offset in zip(packed.places, packed.tensors, packed.offsets):
            where.table[where.name] = _like(stored, self._buffers[place][offset:])
        self._running = layer

    def _depart(self) -> None:
        """Put what lies in CPU memory back into the modules of the block that ran last, also where an error has ended it."""
        if self._running is not None:
            packed = self._packed[self._running]
            for where, stored in zip(packed.places, packed.tensors):
                where.table[where.name] = stored
            self._running = None

    def _check(self, layer: int) -> None:
        """Pack a block anew if its tensors are no longer those that were packed."""
        packed, places = self._packed[layer], _places(self._blocks[layer])
        known = [id(tensor) for tensor in packed.tensors] == [id(place.tensor) for place in places]
        if not known or [place.tensor.data_ptr() for place in places] != packed.addresses:
            self.copies.finish()
            # Into new memory: who has exchanged a weight may hold the old one, to put it back.
            self._packed[layer] = _pack(self._blocks[layer], self._memory)
            self.forget()

    def _bring(self, layer: int, place: int) -> None:
        self.prepare()
        memory = self._packed[layer].memory
        self.copies.copy(self._buffers[place][None, None, : len(memory)], memory[None, None])
        self._staged[place], self._arrived[place] = layer, self.copies.mark()

    def forget(self) -> None:
        """Take nothing for granted of what is on the device, as where weights may have been changed in their places."""
        self._staged = [-1] * PLACES  # which block each buffer holds, or is about to hold
        self._arrived: list[Any] = [None] * PLACES  # the mark after its copy


class BlockHook(NamedTuple):
    """A hook on a block that changes nothing but where its weights are."""

    blocks: OffloadedBlocks
    layer: int


class _Arrival(BlockHook):
    def __call__(self, block, inputs) -> None:
        if not self.blocks.by_forwards:
            self.blocks.arrive(self.layer)


class _Departure(BlockHook):
    def __call__(self, block, inputs, output) -> None:
        self.blocks._depart()


@torch.inference_mode(False)
@torch.no_grad()
def offload_blocks(transformer, device: torch.device | str) -> OffloadedBlocks:
    """Keep the weights of a transformer's blocks in CPU memory. What lies outside of them stays where it is.

    device: where the transformer computes.
    """
    if (known := offloaded_blocks(transformer)) is not None:
        return known
    return OffloadedBlocks(transformer.blocks, torch.device(device))


def offloaded_blocks(transformer) -> OffloadedBlocks | None:
    """What keeps the blocks' weights of a transformer in CPU memory; None where nothing does."""
    hooks = transformer.blocks[0]._forward_pre_hooks.values()
    return next((hook.blocks for hook in hooks if isinstance(hook, BlockHook)), None)


def blocks_device(blocks) -> torch.device:
    """Where blocks compute."""
    hooks = blocks[0]._forward_pre_hooks.values()
    elsewhere = next((hook.blocks.device for hook in hooks if isinstance(hook, BlockHook)), None)
    return elsewhere or blocks[0].scale_shift_table.device


@contextmanager
def blocks_aside(transformer) -> Iterator[None]:
    """What moves a transformer meanwhile leaves its blocks where they are."""
    blocks = transformer.blocks
    transformer.blocks = nn.ModuleList()
    try:
        yield
    finally:
        transformer.blocks = blocks


def move_outside(transformer, device: torch.device) -> None:
    """Move what lies outside of a transformer's blocks to a device."""
    with blocks_aside(transformer):
        transformer.to(device)


def weight_nbytes(transformer) -> int:
    """Bytes that the weights of a transformer take on the device where it computes."""
    blocks = offloaded_blocks(transformer)
    everything = sum(parameter.nbytes for parameter in transformer.parameters())
    if blocks is None:
        return everything
    return everything - sum(p.nbytes for p in transformer.blocks.parameters()) + blocks.device_nbytes


def spared_by_offloading(transformer) -> int:
    """Bytes of a device that `offload_blocks` would spare; 0 where that is done."""
    if offloaded_blocks(transformer) is not None:
        return 0
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in transformer.blocks]
    return max(sum(sizes) - PLACES * max(sizes), 0)


def _places(block: nn.Module) -> list[Place]:
    tables = [table for part in block.modules() for table in (part._parameters, part._buffers)]
    return [Place(table, name) for table in tables for name, tensor in table.items() if tensor is not None]


@torch.inference_mode(False)
@torch.no_grad()
def _pack(block: nn.Module, memory: HostMemory) -> Packed:
    """Lay the tensors of a block side by side; its modules then hold views of that memory."""
    places, offsets, size = _places(block), [], 0
    for place in places:
        offsets.append(size)
        size += -(-place.tensor.nbytes // ALIGNED) * ALIGNED
    flat = memory.zeros((size,), torch.uint8)
    tensors = []
    for place, offset in zip(places, offsets):
        kept = _like(place.tensor, flat[offset:])
        kept.data.copy_(place.tensor.data)
        place.table[place.name] = kept
        tensors.append(kept)
    return Packed(places, tensors, flat, offsets, [tensor.data_ptr() for tensor in tensors])


def _like(tensor: Any, memory: Tensor) -> Any:
    """A tensor, parameter or packed parameter of that shape and dtype at the beginning of bytes."""
    made = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    if hasattr(tensor, "quant_type"):
        return type(tensor)(made, quant_type=tensor.quant_type)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
