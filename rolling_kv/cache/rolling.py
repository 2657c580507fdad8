"""The rolling key/value cache: per layer one preallocated buffer, kept frames and a ring, nothing shifted or concatenated.

Keys are stored after RoPE, and attention without a mask does not depend on the order of its keys. So a frame that
leaves the window is simply overwritten by the next one, and until the first frame leaves, the layout is plain append.
Every index is a host-side integer: no device synchronisation, static shapes once the window is full.

Window semantics are Self-Forcing's (https://arxiv.org/abs/2506.08009): the window counts the sink and the chunk being
made, and the oldest frames leave before the chunk attends. Everything else that families of models do is a rule of
`CacheConfig`, and work that is done once per chunk and layer, before the chunk's first pass writes there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from ..config import CacheConfig
from ..devices import to_device
from ..rope import rotary_angles, rotate, rotations, time_shift_angles
from .averages import MemoryAverages, SinkAverage
from .codecs import CODECS, Parts
from .kept import KeptFrames, each_tensor
from .offload import Offloaded
from .sizes import CacheBytes, CacheShape
from .stores import Resident, Sizes
from .window import FrameWindow, Rearranged

Spans = list[tuple[int, int]]
"""(first token, count) each, in the buffer."""
Work = Callable[[int, Parts], Spans]
"""What is to be done in a layer before a chunk is written there: (layer, its parts) -> where it wrote."""


Places = Sequence[tuple[int, ...]] | torch.Tensor
"""Where the tokens of a chunk go: (first token, slot, count) of each segment, or the slot of each token, int64 [S]."""


_PLACES = ("offset", "_away", "_away_next", "_last", "_placed")
"""What a cache knows of its frames beside the window, none of which is ever changed in its place."""


class Turning(Protocol):
    """What makes keys of what was projected while it writes them, in the place of the codec: see `wan.kernels.Turn`."""

    def turned(self, heads: torch.Tensor, /) -> torch.Tensor:
        """The keys of projected [B, S, H, D], which nothing keeps."""
        ...

    def write(self, parts: Parts, places: Places, key: torch.Tensor, value: torch.Tensor | None, /) -> None:
        """Write projected keys, and values unless they are there, into their places in the parts of a layer."""
        ...

    def read(self, parts: Parts, dtype: torch.dtype, /) -> torch.Tensor:
        """What some parts hold, in a dtype."""
        ...


class RollingKVCache:
    """Keys and values of the latent frames in the window, for one guidance branch.

    shape: everything that decides the bytes of one latent frame.
    config: window, sink and their rules, and how bytes are kept.
    device: where the model computes.
    capacity: latent frames to allocate where the window is unlimited; `reserve` adds more at once, `begin` adds by halves
        of what there is. With a window, the capacity is the window.

    Raises ValueError for an unlimited window without a capacity.
    """

    def __init__(self, shape: CacheShape, config: CacheConfig, device: torch.device | str, capacity: int | None = None):
        if config.limit is not None:
            capacity = config.limit
        elif not capacity or capacity < 1:
            raise ValueError(f"an unlimited window needs a capacity of at least 1 latent frame, got {capacity}")
        self.shape = shape
        self.config = config
        self.device = torch.device(device)
        self.codec = CODECS[config.storage](shape.dtype)
        self.store = (Offloaded if config.offload else Resident)(shape.layers, self._sizes(capacity), self.device)
        self.window = FrameWindow(capacity, config.sink, config.held - config.sink, config.unlimited)
        self._forget()

    def _forget(self) -> None:
        """Hold nothing that was written, and plan nothing."""
        self.offset: float = (
            0  # latent frames by which cuts have moved all later positions, where positions are absolute
        )
        self._away: float = 0  # latent frames by which the open or last chunk stands away from the window's positions
        self._away_next: float = 0
        self._work: list[Work] = []  # of the open chunk
        self._worked: set[int] = set()  # layers in which it is done
        self._reach = 0  # slots that the work reads
        self._last = range(0)  # frames of the last chunk
        self._originals: dict[int, Parts] = {}  # per layer, the kept frames' keys as first written
        self._placed: tuple[tuple[int, int], ...] = ()  # kept frames, and by how much their keys have been moved
        averages = {"drop": None, "ema": SinkAverage, "memory": MemoryAverages}[self.config.leaving]
        self.averages = averages(self.shape, self.config) if averages else None

    @staticmethod
    def bytes_needed(shape: CacheShape, config: CacheConfig, frames: int) -> CacheBytes:
        """Bytes that a cache of `frames` latent frames takes at its peak: what it keeps, and one layer unpacked."""
        kept = RollingKVCache.bytes_kept(shape, config, frames)
        heads = 2 * shape.batch * frames * shape.tokens_per_frame * shape.heads  # keys and values
        unpacked = heads * CODECS[config.storage](shape.dtype).unpack_bytes(shape.head_dim)
        return CacheBytes(kept.device + unpacked, kept.host)

    @staticmethod
    def bytes_kept(shape: CacheShape, config: CacheConfig, frames: int) -> CacheBytes:
        """Bytes of a cache that holds `frames` latent frames, known before anything is allocated."""
        total = shape.bytes_per_frame(config.storage) * frames
        averages = 0
        if config.leaving == "ema":
            averages = SinkAverage.bytes_needed(shape, config)
        elif config.leaving == "memory":
            averages = MemoryAverages.bytes_needed(shape, config)
        # Frames whose keys are kept as written, beside those that stand elsewhere. An average is moved itself.
        moved = config.sink * (1 + config.shot_sink)
        if config.positions == "absolute" or config.leaving == "ema":
            moved = 0
        originals = shape.bytes_per_frame(config.storage) * moved // 2
        if config.offload:
            return CacheBytes(total // shape.layers * 2 + averages, total + originals)
        return CacheBytes(total + originals + averages, 0)

    @property
    def nbytes(self) -> CacheBytes:
        """Bytes held now."""
        originals = sum(part.nbytes for parts in self._originals.values() for part in parts)
        averages = self.averages.nbytes if self.averages else 0
        if self.config.offload:
            return CacheBytes(self.store.device_bytes + averages, self.store.host_bytes + originals)
        return CacheBytes(self.store.device_bytes + originals + averages, self.store.host_bytes)

    def _sizes(self, frames: int) -> Sizes:
        shape = self.shape
        size = (2, shape.batch, frames * shape.tokens_per_frame, shape.heads)  # [K/V, B, S, H]
        return [((*size, width), dtype) for width, dtype in self.codec.widths(shape.head_dim)]

    def reserve(self, frames: int) -> None:
        """Make room for a video of `frames` latent frames. Only an unlimited window ever grows."""
        if self.config.unlimited and frames > self.window.capacity:
            # No frame ever leaves an unlimited window to make room, so its ring never wraps around: the layout stays.
            self.store.resize(self._sizes(frames), self.window.filled * self.shape.tokens_per_frame)
            self.window.capacity = frames

    def grow(self, frames: int) -> None:
        """Make room for `frames` latent frames, and for some that follow: appends cost little more than their own size."""
        if frames <= self.window.capacity:
            return
        try:
            self.reserve(max(frames, self.window.capacity * 3 // 2))
        except ValueError:  # there is too little RAM for those that follow
            self.reserve(frames)

    def reset(self) -> None:
        """Forget every frame; the buffers stay allocated."""
        window = self.window
        self.window = FrameWindow(window.capacity, window.sink, window.held - window.sink, window.unlimited)
        self._forget()
        self.store.discard()

    def release(self) -> None:
        """Give the memory back now, whoever still refers to this cache, which is of no use any more."""
        self.store.release()
        self._originals.clear()
        self.averages = None

    def kept_frames(self) -> KeptFrames | None:
        """What the cache holds, in CPU memory, for `restore`; None while something is still to be done for the open chunk."""
        if self._work and len(self._worked) < self.shape.layers:
            return None
        self.store.finish()
        used = self._tokens(0, self.window.filled)
        aside = partial(torch.Tensor.to, device="cpu", copy=True)
        layers = tuple(tuple(aside(part[:, :, used]) for part in parts) for parts in self.store.layers)
        averages = self.averages.layers if self.averages else {}
        places = {name: getattr(self, name) for name in _PLACES}
        return KeptFrames(
            layers, each_tensor(self._originals, aside), each_tensor(averages, aside), copy.copy(self.window), places
        )

    def restore(self, kept: KeptFrames) -> None:
        """Hold what `kept_frames` gave, of a cache of this shape and these settings, and nothing else."""
        self.reset()
        self.reserve(kept.window.filled)
        used, capacity = self._tokens(0, kept.window.filled), self.window.capacity
        for parts, sources in zip(self.store.layers, kept.layers):
            for part, source in zip(parts, sources):
                part[:, :, used] = source
        self.window = copy.copy(kept.window)
        self.window.capacity = capacity
        for name, value in kept.places.items():
            setattr(self, name, value)
        self._originals = {layer: self.store.copied(parts) for layer, parts in kept.originals.items()}
        if self.window.open:
            self._aim()
        if self.averages is not None:
            self.averages.layers = each_tensor(kept.averages, partial(torch.Tensor.to, device=self.device, copy=True))

    @property
    def position(self) -> float:
        """Where the open chunk's first frame stands in time, in latent frames."""
        return self.window.end + self.offset + self._away

    def begin(self, frames: int) -> None:
        """Open a chunk of `frames` latent frames. See `FrameWindow.begin`; an unlimited window grows if it must.

        A chunk of this size that is open already, because it was cancelled, stays as it is: what has left, has left.
        """
        window = self.window
        if not window.open:
            self._open(frames)
        elif window.open != frames:
            window.begin(frames)
        self._aim()

    def _aim(self) -> None:
        """Know where passes over the open chunk write and read."""
        tokens, window = self.shape.tokens_per_frame, self.window
        self._writes = [tuple(tokens * n for n in segment) for segment in window.segments()]
        self._slots = None
        self._used = window.filled * tokens

    def _open(self, frames: int) -> None:
        window = self.window
        self._reach = max(self._reach, window.filled)
        self._bring_back()
        self.grow(window.filled + frames)  # first: a shot is kept apart only where frames have to leave
        for rearranged in window.place_shot(frames):
            self._rearrange(rearranged)
        window.begin(frames)
        self._away, self._away_next = self._away_next, 0
        if self.averages is not None and window.leaving:
            self._work.append(self._folding())
        self._place_kept()

    @property
    def repeats(self) -> bool:
        """Whether a pass over the open chunk differs from one over a later chunk of its size in `slots` alone.

        Not while the window is not full yet, nor in a chunk's first pass where kept frames move, nor where offloaded layers
        come and go.
        """
        done = not self._work or len(self._worked) == self.shape.layers
        return done and not self.config.offload and self.window.filled == self.config.limit

    @property
    def slots(self) -> torch.Tensor:
        """The slot of each token of the open chunk, int64 [S] on the device: `Places` that passes can share."""
        if self._slots is None:
            slots = torch.cat([torch.arange(slot, slot + count) for _, slot, count in self._writes])
            self._slots = to_device(slots, self.device)
        return self._slots

    def commit(self) -> None:
        """The open chunk, as last written, becomes part of the past."""
        self._last = range(self.window.end, self.window.end + self.window.open)
        self.window.commit()
        self._work, self._worked, self._reach = [], set(), 0

    def update(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor | None,
        turning: Turning | None = None,
        slots: torch.Tensor | None = None,
        as_kept: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the open chunk's keys and values of one layer, and return everything it attends to.

        layer: index of the transformer block.
        key, value: [B, S, H, D] with S tokens of the open chunk, the key after RoPE.
        turning: what makes keys of projections while it writes them; the key is such a projection then.
            The value may be None: what `value_rows` has given is filled.
        slots: where the device finds the tokens' slots, see `slots`; None: the CPU tells them.
        as_kept: whether what is stored in float8 is to come as it is, for attention that reads float8.

        Returns keys and values, [B, used tokens, H, D] each, valid until the next update: views of the buffer, or copies
        where the storage has another dtype.
        """
        parts = self.write(layer, key, value, turning, slots)
        return self._read(parts, slice(self._used), turning, as_kept)

    def _read(
        self, parts: Parts, tokens: slice, turning: Turning | None, as_kept: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (tuple(part[kind, :, tokens] for part in parts) for kind in (0, 1))
        if as_kept and self.config.storage == "float8":
            return keys[0], values[0]
        if turning is not None:
            return turning.read(keys, self.shape.dtype), turning.read(values, self.shape.dtype)
        return self.codec.unpack(keys), self.codec.unpack(values)

    def write(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor | None,
        turning: Turning | None = None,
        slots: torch.Tensor | None = None,
    ) -> Parts:
        """The writing half of `update`; returns the layer's stored parts."""
        parts = self.store.open(layer, max(self._used, self._reach * self.shape.tokens_per_frame))
        written: Spans = [(slot, count) for _, slot, count in self._writes]
        if layer not in self._worked:
            for work in self._work:
                written += work(layer, parts)
            self._worked.add(layer)
        if turning is not None:
            turning.write(parts, self._writes if slots is None else slots, key, value)
        else:
            assert value is not None
            self._pack(parts, key, value, slots)
        self.store.close(layer, written)
        return parts

    def value_rows(self, layer: int) -> list[tuple[int, torch.Tensor]] | None:
        """Where the open chunk's values may be written before `update`: (first token, rows [B, S, H, D]) of each segment.

        None where they are packed, offloaded, or something is still to be done in the layer with what they take the place of.
        """
        waiting = bool(self._work) and layer not in self._worked
        if waiting or self.config.offload or self.config.storage != "model":
            return None
        (part,) = self.store.open(layer, self._used)
        return [(source, part[1, :, slot : slot + count]) for source, slot, count in self._writes]

    def _pack(self, parts: Parts, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor | None) -> None:
        for kind, packed in enumerate((self.codec.pack(key), self.codec.pack(value))):
            for part, fresh in zip(parts, packed):
                if slots is not None:
                    put_at(slots, part[kind], fresh)
                    continue
                for source, slot, count in self._writes:
                    part[kind, :, slot : slot + count] = fresh[:, source : source + count]

    # What happens between two chunks.

    def flush(self) -> None:
        """Forget all but the first frame and the last two. Source: Infinity-RoPE (https://arxiv.org/abs/2511.20649)."""
        self._bring_back()
        self._reach = max(self._reach, self.window.filled)
        if rearranged := self.window.flush():
            self._rearrange(rearranged)

    def cut(self) -> None:
        """Begin a new shot with the next chunk."""
        self._bring_back()
        if self.config.cut_flush:
            self.flush()
        if self.config.positions == "absolute":
            self.offset += self.config.cut_offset
        else:
            self._away_next = self.config.cut_offset

    def drop_to_sink(self) -> None:
        """Forget all but the sink, an open chunk included, which is then opened anew where it stood in time."""
        self._away_next, self._away = self._away, 0
        self._work, self._worked = [], set()
        self._keep_originals(len(self.window.drop_to_sink().sources))

    def restart(self, at: int, keep_sink: bool) -> int:
        """Forget the frames that a window at the latent frame `at` holds, to write them anew; returns the first of them.

        See `FrameWindow.restart`.
        """
        if self.window.restart(at, keep_sink):
            self._away = self._away_next = self._reach = 0
            self._work, self._worked = [], set()
            self._keep_originals(len(self.window.kept))
        else:
            offset = self.offset
            self._forget()
            self.offset = offset
        self.store.discard()
        return self.window.end

    def _keep_originals(self, frames: int) -> None:
        """Of the kept frames' keys as first written, keep those of the first `frames`."""
        for layer, parts in self._originals.items():
            self._originals[layer] = tuple(part[:, self._tokens(0, frames)] for part in parts)
        self._placed = ()

    # The work that this takes, in each layer.

    def _tokens(self, slot: int, frames: int = 1) -> slice:
        return slice(slot * self.shape.tokens_per_frame, (slot + frames) * self.shape.tokens_per_frame)

    def _spans(self, slots: Sequence[tuple[int, int]]) -> Spans:
        tokens = self.shape.tokens_per_frame
        return [(slot * tokens, count * tokens) for slot, count in slots]

    def _turn(self, shifts: Sequence[float]) -> torch.Tensor:
        """The rotation that moves as many frames' keys by so many latent frames each, as `rope.rotate` takes it."""
        angles = [time_shift_angles(self.shape.head_dim, shift) for shift in shifts]
        if len(set(shifts)) == 1:
            turn = rotations(angles[0])
        else:
            turn = rotations(torch.stack(angles)).repeat_interleave(self.shape.tokens_per_frame, 0)[None, :, None]
        return to_device(turn.to(torch.complex64), self.device)

    def _rearrange(self, rearranged: Rearranged) -> None:
        self._placed = ()
        moves, sources = rearranged
        if moves or self._originals:
            self._work.append(partial(self._move, moves, sources))

    def _move(
        self, moves: list[tuple[int, int]], sources: list[tuple[int | None, int]], layer: int, parts: Parts
    ) -> Spans:
        """Bring frames to other slots. sources: for each kept frame, its place among the old kept ones, and its old slot."""
        if layer in self._originals:
            old = tuple(part.to(self.device) for part in self._originals[layer])
            had = old[0].shape[1] // self.shape.tokens_per_frame
            pieces = [
                tuple(part[:, self._tokens(index)] for part in old)
                if index is not None and index < had
                else tuple(part[0, :, self._tokens(slot)] for part in parts)
                for index, slot in sources
            ]
            self._originals.pop(layer)
            if pieces:
                joined = tuple(torch.cat(pieces, dim=1) for pieces in zip(*pieces))
                self._originals[layer] = self.store.copied(joined)
        for part in parts:
            taken = [part[:, :, self._tokens(old)].clone() for old, _ in moves]
            for (_, new), frame in zip(moves, taken):
                part[:, :, self._tokens(new)] = frame
        return self._spans([(new, 1) for _, new in moves])

    def _bring_back(self) -> None:
        """Let the last chunk, which a cut has put elsewhere in time, stand where its frames follow each other."""
        if not self._away:
            return
        window = self.window
        self._reach = max(self._reach, window.filled)
        slots = [window.slot(frame) for frame in self._last if frame in window.kept or frame >= window.oldest]
        turn, self._away = self._turn([-self._away]), 0

        def work(layer: int, parts: Parts) -> Spans:
            for slot in slots:
                keys = self.codec.unpack(tuple(part[0, :, self._tokens(slot)] for part in parts))
                for part, packed in zip(parts, self.codec.pack(rotate(keys, turn))):
                    part[0, :, self._tokens(slot)] = packed
            return self._spans([(slot, 1) for slot in slots])

        self._work.append(work)

    def _places(self) -> range:
        """Where the kept slots stand in time while the chunk is open that has been begun."""
        window = self.window
        total, filled = window.end + window.open, window.filled
        span = filled if self.config.span is None else max(filled, min(total, self.config.span))
        return range(total - span, total - span + len(window.kept))

    def _place_kept(self) -> None:
        """Plan to write the kept frames as they are now: moved in time to just before the rest of the window, or averaged."""
        window, averages = self.window, self.averages
        averaged = isinstance(averages, SinkAverage) and len(window.leaving) > 0
        follows = self.config.positions == "window"
        if not (follows or averaged):
            return
        known = window.kept[: window.kept_until(window.end)]
        if isinstance(averages, MemoryAverages):
            known = known[: self.config.sink]
        shifts = [place - frame if follows else 0 for frame, place in zip(known, self._places())]
        before, self._placed = self._placed, tuple(zip(known, shifts))
        moved = self._placed != before and (any(shifts) or bool(self._originals))
        if shifts and (moved or averaged):
            self._work.append(partial(self._write_kept, len(shifts), self._turn(shifts) if any(shifts) else None))

    def _write_kept(self, frames: int, turn: torch.Tensor | None, layer: int, parts: Parts) -> Spans:
        place = self._tokens(0, frames)
        if isinstance(self.averages, SinkAverage) and layer in self.averages.layers:
            written = list(self.averages.layers[layer])
        else:
            # Turned from the keys as they were written, every time: rounding does not add up.
            originals = self._original(layer, parts, frames)
            written = [self.codec.unpack(tuple(part.to(self.device, non_blocking=True) for part in originals))]
        if turn is not None:
            written[0] = rotate(written[0], turn)
        for kind, heads in enumerate(written):
            for part, packed in zip(parts, self.codec.pack(heads.to(self.shape.dtype))):
                part[kind, :, place] = packed
        return self._spans([(0, frames)])

    def _original(self, layer: int, parts: Parts, frames: int) -> Parts:
        """The first `frames` kept frames' keys as they were written."""
        kept = self._originals.get(layer)
        had = kept[0].shape[1] // self.shape.tokens_per_frame if kept else 0
        if kept is None or had < frames:
            fresh = tuple(part[0, :, self._tokens(had, frames - had)] for part in parts)
            if kept is not None:
                fresh = tuple(torch.cat([old.to(self.device), new], dim=1) for old, new in zip(kept, fresh))
            kept = self._originals[layer] = self.store.copied(fresh)
        return kept

    def _folding(self) -> Work:
        """The work of averaging what leaves for the open chunk."""
        window, kept = self.window, self.window.kept
        slots = [window.slot(frame) for frame in window.leaving]
        if isinstance(self.averages, SinkAverage):
            # The i-th frame to leave goes into the sink's i-th, over and over.
            targets = [(frame - kept[0]) % len(kept) for frame in window.leaving]
            shifts = [kept[target] - frame for target, frame in zip(targets, window.leaving)]
            return partial(self._fold_into_sink, slots, targets, self._turn(shifts))
        sink, grid = self.config.sink, self.shape.grid
        leaving = rotary_angles(self.shape.head_dim, window.leaving.start, len(slots), *grid)
        memory = rotary_angles(self.shape.head_dim, self._places()[sink], 2, *grid)
        turns = (
            to_device(rotations(angles).to(torch.complex64)[None, :, None], self.device)
            for angles in (-leaving, memory)
        )
        return partial(self._fold_into_memory, slots, *turns)

    def _fold_into_sink(
        self, slots: list[int], targets: list[int], turn: torch.Tensor, layer: int, parts: Parts
    ) -> Spans:
        averages = self.averages
        assert isinstance(averages, SinkAverage)
        if layer not in averages.layers:
            sink, values = self._heads(parts, [(0, len(self.window.kept))])
            if layer in self._originals:  # it has been moved in time
                sink = self.codec.unpack(tuple(part.to(self.device) for part in self._originals.pop(layer)))
            averages.start(layer, sink, values)
        keys, values = self._heads(parts, [(slot, 1) for slot in slots])
        keys = rotate(keys.to(averages.dtype), turn)
        tokens = self.shape.tokens_per_frame
        runs = [(0, len(slots))] if targets == list(range(targets[0], targets[0] + len(slots))) else None
        for first, count in runs or [(index, 1) for index in range(len(slots))]:
            place = slice(first * tokens, (first + count) * tokens)
            averages.fold(layer, targets[first] * tokens, keys[:, place], values[:, place])
        return []  # `_write_kept` brings it into view

    def _fold_into_memory(
        self, slots: list[int], back: torch.Tensor, place: torch.Tensor, layer: int, parts: Parts
    ) -> Spans:
        averages, sink, tokens = self.averages, self.config.sink, self.shape.tokens_per_frame
        assert isinstance(averages, MemoryAverages)
        keys, values = self._heads(parts, [(slot, 1) for slot in slots])
        averages.fold(layer, rotate(keys.float(), back), values)
        keys, values = (torch.cat(both, 1).repeat_interleave(tokens, 1) for both in zip(*averages.layers[layer]))
        for kind, heads in enumerate((rotate(keys, place), values)):
            for part, packed in zip(parts, self.codec.pack(heads.to(self.shape.dtype))):
                part[kind, :, self._tokens(sink, 2)] = packed
        return self._spans([(sink, 2)])

    def _heads(self, parts: Parts, slots: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Keys and values of frames, (first slot, count) each, [B, S, H, D]."""
        spans = [self._tokens(slot, count) for slot, count in slots]
        return [
            self.codec.unpack(tuple(torch.cat([part[kind, :, span] for span in spans], dim=1) for part in parts))
            for kind in (0, 1)
        ]


def put_at(slots: torch.Tensor, part: torch.Tensor, fresh: torch.Tensor) -> None:
    """Write tokens [B, S, ...] to their slots in [B, all slots, ...]. slots: int64 [S]."""
    if part.dtype == torch.float8_e4m3fn:  # for which devices lack this
        part, fresh = part.view(torch.uint8), fresh.view(torch.uint8)
    part.index_copy_(1, slots, fresh.to(part.dtype))
