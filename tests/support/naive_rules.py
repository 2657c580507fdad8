"""The rules of a cache a second time, naively: a list of slots, unrotated keys, everything rotated anew in every pass.

Written from the words in which the families' rules are told (`tests/data`), without rings, moves or averages in place. It
takes a cache's place in an attachment; the switches and the order of passes are here, too.
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from rolling_kv.cache.prompt import Branch, PromptCache
from rolling_kv.sampling.denoiser import Denoiser
from rolling_kv.sampling.schedule import sample_chunk
from rolling_kv.wan.attachment import apply_rolling_kv_cache


@dataclass
class Slot:
    """One latent frame: its number, its place in time where positions are absolute, and each layer's unrotated heads."""

    frame: int
    at: float
    heads: dict = field(default_factory=dict)  # layer -> (key, value), [B, tokens, H, D]


class NaiveCache:
    """In the place of a `RollingKVCache`, for passes of an attachment."""

    layout = None

    def __init__(self, shape, config):
        self.shape, self.config = shape, config
        self.slots: list[Slot] = []
        self.offset = 0.0
        self.away = 0.0
        self.pin: list[int] = []  # frames of the shot's beginning
        self.settled = False  # whether they lie right behind the sink, and are spared there
        self.folded = False
        self.window = self  # `open` is all that a pass asks of it
        self.open = self.total = 0

    @property
    def held(self):
        """Slots that make no room: the sink, a memory, and a shot's beginning once it lies right behind."""
        return self.config.held + (len(self.pin) if self.settled else 0)

    # Passes.

    def begin(self, start, frames, away=0.0):
        """The first pass of a chunk: what does not fit leaves, and the chunk's slots are appended."""
        config = self.config
        excess = 0 if config.unlimited else max(0, len(self.slots) + frames - config.limit)
        if excess:
            self.leave(excess, frames)
        self.slots += [Slot(start + i, start + i + self.offset) for i in range(frames)]
        self.open, self.total, self.away = frames, start + frames, away

    def leave(self, excess, frames):
        sink, config = self.config.sink, self.config
        first = sink + 2 * (config.leaving == "memory")
        if self.pin and self.pin[0] not in [slot.frame for slot in self.slots[:sink]]:
            others = [slot for slot in self.slots[first:]]
            reached = any(slot.frame == self.pin[0] for slot in others[:excess])
            if self.settled or reached:
                if config.limit - sink - len(self.pin) < frames:
                    self.pin = []
                else:
                    self.settled = True
        pinned = self.pin if self.settled else []
        going = [slot for slot in self.slots[first:] if slot.frame not in pinned][:excess]
        self.slots = [slot for slot in self.slots if slot not in going]
        if config.leaving == "ema":
            for slot in going:
                target = self.slots[(slot.frame - self.slots[0].frame) % sink]
                for layer, heads in slot.heads.items():
                    target.heads[layer] = tuple(
                        config.ema_alpha * old + (1 - config.ema_alpha) * new
                        for old, new in zip(target.heads[layer], heads)
                    )
        elif config.leaving == "memory":
            for layer in range(self.shape.layers):
                means = [
                    torch.cat([slot.heads[layer][kind] for slot in going], 1).mean(1, keepdim=True) for kind in (0, 1)
                ]
                for memory, alpha in zip(self.slots[sink : sink + 2], config.memory_alphas):
                    old = (
                        memory.heads[layer]
                        if self.folded
                        else [m.expand_as(h) for m, h in zip(means, memory.heads[layer])]
                    )
                    memory.heads[layer] = tuple(alpha * m + (1 - alpha) * o for m, o in zip(means, old))
            self.folded = True

    def places(self):
        """Where every slot stands in time."""
        config, count = self.config, len(self.slots)
        if config.positions == "absolute":
            places = [slot.at for slot in self.slots]
        else:
            places = list(range(count))
            held = min(self.held, count - self.open)  # the frames of one pass follow each other
            if config.span is not None and count > self.held:
                end = min(self.total, config.span)
                places[held:] = range(end - (count - held), end)
        own = count - self.open
        return places[:own] + [place + self.away for place in places[own:]]

    @property
    def position(self):
        return self.places()[-self.open]

    def update(self, layer, key, value, slots=None, as_kept=False):
        """slots: of the open chunk in a buffer of the device; as_kept: in which form it is read. Both are nothing here."""
        tokens, places = self.shape.tokens_per_frame, self.places()
        own = zip(self.slots[-self.open :], places[-self.open :], key.split(tokens, 1), value.split(tokens, 1))
        for slot, place, fresh, kept in own:
            slot.heads[layer] = self.turn(fresh, -place, -1), kept
        keys, values = zip(*(slot.heads[layer] for slot in self.slots))
        return torch.cat([self.turn(k, place, 1) for k, place in zip(keys, places)], 1), torch.cat(values, 1)

    write = update

    def turn(self, key, place, sign):
        """One frame's keys rotated to a place in time and to each token's row and column, or back from there."""
        height, width = self.shape.grid
        half = key.shape[-1] // 2
        rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        spots = torch.full((height * width,), float(place)), rows * sign, columns * sign
        dims = half - 2 * (half // 3), half // 3, half // 3
        angles = torch.cat(
            [torch.outer(s.double(), 10000.0 ** (-torch.arange(n).double() / n)) for s, n in zip(spots, dims)], 1
        )
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        pairs = torch.view_as_complex(key.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).float()

    # Between chunks.

    def flush(self):
        if len(self.slots) > (3 if self.config.sink else 2):
            self.slots = self.slots[: min(1, self.config.sink)] + self.slots[-2:]
            self.pin, self.settled = [], False

    def cut(self):
        """Returns how far away from its place the next chunk stands."""
        if self.config.cut_flush:
            self.flush()
        if self.config.positions == "absolute":
            self.offset += self.config.cut_offset
            return 0.0
        return self.config.cut_offset

    def drop_to_sink(self, start, frames):
        """A cut's chunk enters anew, behind nothing but the sink."""
        self.slots = [slot for slot in self.slots[: self.config.sink] if slot.frame < start]
        self.pin, self.settled = [], False
        self.begin(start, frames, self.away)

    def restart(self, at):
        """Forget what a window at `at` holds; returns the first frame that is to be written anew."""
        config, held = self.config, self.held
        rest = 0 if config.unlimited else config.limit - held
        keep = config.global_sink and held and not config.unlimited and at > config.limit
        if keep and len(self.slots) >= held and self.slots[held - 1].frame < at - rest:
            self.slots = self.slots[:held]
            if not self.settled:
                self.pin = []
            return at - rest
        self.slots, self.folded, self.pin, self.settled = [], False, [], False
        return 0 if config.unlimited else max(0, at - config.limit)


class NaiveVideo:
    """A video made chunk by chunk."""

    def __init__(self, model, config, sampling, shape, negative=None):
        self.model, self.config, self.sampling = model, config, sampling
        self.caches = [NaiveCache(shape, config) for _ in range(sampling.branches)]
        self.negative = negative
        self.chunks = []

    @property
    def frames(self):
        return sum(chunk.shape[2] for chunk in self.chunks)

    def given(self, latents, prompt, switch):
        """A chunk that is given enters."""
        branches = self.begun(latents.shape[2], prompt, switch, 0.0)
        self.enter(latents, branches, switch, 0.0)

    def sampled(self, frames, noise, prompt, switch):
        """A chunk of `frames` frames is made from the draws `noise`, and enters. Returns its latents."""
        branches = self.begun(frames, prompt, switch, self.sampling.context_noise)
        passes = [partial(self.run, branch) for branch in branches]
        predict = Denoiser(passes, self.sampling, torch.float32, None, lambda: None)
        latents = sample_chunk(predict, noise, self.sampling, self.frames)
        self.enter(latents, branches, switch, self.sampling.context_noise)
        return latents

    @torch.inference_mode()
    def run(self, branch, latents, timestep):
        with apply_rolling_kv_cache(self.model.transformer) as attachment:
            return attachment.forward(latents, timestep, branch)

    def begun(self, frames, prompt, switch, timestep):
        """The branches after a switch, with a chunk of `frames` frames open. timestep: of passes that recompute."""
        start, away = self.frames, 0.0
        branches = [Branch(cache, PromptCache(words)) for cache, words in zip(self.caches, (prompt, self.negative))]
        if switch in ("joint", "causal"):
            first = [cache.restart(start) for cache in self.caches][0]
            past = torch.cat(self.chunks, 2)[:, :, first:]
            for piece in past.split([past.shape[2]] if switch == "joint" else self.pieces(past.shape[2]), 2):
                for branch in branches:
                    branch.cache.begin(first, piece.shape[2])
                    self.run(branch, piece, timestep)
                first += piece.shape[2]
        for cache in self.caches:
            if switch == "flush":
                cache.flush()
            elif switch == "cut":
                away = cache.cut()
            cache.begin(start, frames, away)
        return branches

    def enter(self, latents, branches, switch, timestep):
        """The context pass of a chunk."""
        start, frames, config = self.frames, latents.shape[2], self.config
        for branch in branches:
            cache = branch.cache
            if switch == "cut" and config.shot_clean:
                cache.drop_to_sink(start, frames)
            self.run(branch, latents, timestep)
            if switch == "cut" and config.shot_sink:
                cache.pin, cache.settled = list(range(start, start + min(config.sink, frames))), False
        self.chunks.append(latents)

    def pieces(self, frames):
        chunk = self.sampling.chunk
        return ([frames % chunk] if frames % chunk else []) + [chunk] * (frames // chunk)
