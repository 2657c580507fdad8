"""Bringing working caches to a point of a video: the state's log says what they have to see, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch

from ..cache.prompt import Branch
from ..cache.window import FrameWindow
from ..checkpoints.model import CausalModel
from ..devices import to_device
from .branches import GuidanceBranches
from .checks import fitted_embeds
from .state import CacheState, ChunkRecord

RECOMPUTING = ("joint", "causal")
"""The prompt switches that compute the window anew."""


@dataclass(frozen=True)
class History:
    """Runs context passes and prompt switches, as they happened when the video was made.

    branches: the caches.
    model: that they belong to.
    forward: of the attachment of the transformer that makes context passes, the last of the model's `transformers`.
    chunk: latent frames of a chunk, in which a causal switch computes the window.
    """

    branches: GuidanceBranches
    model: CausalModel
    forward: Callable[..., object]
    chunk: int

    def bring_to(
        self,
        state: CacheState,
        switch: str,
        prompt: torch.Tensor,
        negative: torch.Tensor | None,
        timestep: float,
        on_pass: Callable[[], None],
    ) -> None:
        """Let the caches see every chunk of the state, then switch to what the next chunk is made with.

        switch: one of `config.SWITCHES`, or empty for none.
        prompt, negative: embeddings [B, L, D] of the next chunk. timestep: of its context pass.
        on_pass: called before each pass; whatever it raises cancels.
        """
        first, branches = self._first(state, switch), self.branches
        if first > branches.cached:
            branches.start_over(first, self._offset(state, first))
        at = sum(record.frames for record in state.records[:first])
        for index in range(first, len(state.records)):
            record = state.records[index]
            prompts = self._prompts_of(state, index, negative)
            if not self._is_open():
                self._switch(record.switch, state, at, prompts, record.timestep, on_pass)
                for cache in branches.caches.values():  # at once: an open chunk tells that its switch is done
                    cache.begin(record.frames)
            self._context_pass(state, index, at, self._for_prompts(*prompts), on_pass)
            at += record.frames
        self._switch(switch, state, at, (prompt, negative), timestep, on_pass)
        branches.opened_with = switch

    def passes_to(self, state: CacheState, switch: str) -> int:
        """Passes that `bring_to` takes, counting a guided pair as one."""
        first = self._first(state, switch)
        at = sum(record.frames for record in state.records[:first])
        window = copy(next(iter(self.branches.caches.values())).window)  # goes the same way, without any buffer
        passes = 0
        for index in range(first, len(state.records)):
            record = state.records[index]
            if not window.open:
                passes += self._switch_passes(record.switch, at, window)
                window.place_shot(record.frames)
                window.begin(record.frames)
            passes += 1
            window.commit()
            if self._begins_shot(record):
                window.keep_shot(at, record.frames)
            at += record.frames
        return passes + self._switch_passes(switch, at, window)

    def _begins_shot(self, record: ChunkRecord) -> bool:
        return record.switch == "cut" and self.branches.spec.config.shot_sink

    def _is_open(self) -> bool:
        return any(cache.window.open for cache in self.branches.caches.values())

    def _first(self, state: CacheState, switch: str) -> int:
        """The first chunk to see: what came before a switch that replaces everything need not be."""
        at = state.frames
        if self._replaces_all(switch, at):
            return len(state.records)
        for index in range(len(state.records) - 1, self.branches.cached, -1):
            at -= state.records[index].frames
            if self._replaces_all(state.records[index].switch, at):
                return index
        return self.branches.cached

    def _replaces_all(self, switch: str, at: int) -> bool:
        config = self.branches.spec.config
        keeps_sink = config.global_sink and config.held and config.limit is not None and at > config.limit
        return switch in RECOMPUTING and not keeps_sink

    def _offset(self, state: CacheState, chunks: int) -> float:
        config = self.branches.spec.config
        cuts = sum(record.switch == "cut" for record in state.records[:chunks])
        return cuts * config.cut_offset if config.positions == "absolute" else 0

    def _for_prompts(self, prompt: torch.Tensor, negative: torch.Tensor | None) -> list[Branch]:
        return self.branches.for_prompts(prompt, negative, len(self.model.transformers) - 1)

    def _prompts_of(self, state: CacheState, index: int, negative: torch.Tensor | None):
        """The prompts with which chunk number `index` enters the caches. negative: the session's own, with guidance."""
        fit = partial(fitted_embeds, self.model, self.branches.spec.shape.batch, name="a prompt of the cache state")
        prompt = fit(state.prompts[state.records[index].prompt])
        if len(self.branches.caches) == 1:
            return prompt, None
        known = state.negative_at(index)
        return prompt, negative if known is None else fit(known)

    def _context_pass(
        self, state: CacheState, index: int, at: int, branches: list[Branch], on_pass: Callable[[], None]
    ) -> None:
        record, config = state.records[index], self.branches.spec.config
        # Another model may have made this video, in another dtype.
        latents = to_device(state.chunks[index].to(self.branches.spec.shape.dtype), self.branches.spec.device)
        rows = 1 if record.seed is None else record.frames  # as the original embeds the timestep of given frames
        on_pass()
        for branch in branches:
            if record.switch == "cut" and config.shot_clean:
                branch.cache.drop_to_sink()
            if not branch.cache.window.open:
                branch.cache.begin(record.frames)
            with torch.inference_mode():
                self.forward(latents, record.timestep, branch, time_rows=rows, keys_only=True)
        for branch in branches:  # all or none: a pass that fails leaves the branches at the same point
            branch.cache.commit()
            if self._begins_shot(record):
                branch.cache.window.keep_shot(at, record.frames)
        self.branches.cached = index + 1

    def _switch(self, switch: str, state: CacheState, at: int, prompts, timestep: float, on_pass) -> None:
        """What is done to the caches before the chunk that begins at the latent frame `at`."""
        try:
            for cache in self.branches.caches.values():
                if switch == "flush":
                    cache.flush()
                elif switch == "cut":
                    cache.cut()
            if switch in RECOMPUTING:
                self._recompute(switch, state, at, self._for_prompts(*prompts), timestep, on_pass)
        except BaseException:
            self.branches.start_over()  # neither before the switch nor behind it
            raise

    def _recompute(self, switch: str, state: CacheState, at: int, branches: list[Branch], timestep, on_pass) -> None:
        keep_sink = self.branches.spec.config.global_sink
        start = [branch.cache.restart(at, keep_sink) for branch in branches][0]
        sizes = self._recompute_sizes(switch, at - start)
        self._write(state.frames_between(start, at), sizes, branches, timestep, on_pass)

    def _write(self, latents: torch.Tensor, sizes, branches: list[Branch], timestep: float, on_pass) -> None:
        """Context passes over the frames that come next in the caches, in pieces of those sizes."""
        for piece in latents.split(sizes, dim=2):
            on_pass()
            once = piece.shape[2] > self.chunk
            piece = to_device(piece.to(self.branches.spec.shape.dtype), self.branches.spec.device)
            for branch in branches:
                branch.cache.begin(piece.shape[2])
                with torch.inference_mode():
                    self.forward(piece, timestep, branch, keys_only=True, once=once)
                branch.cache.commit()

    def _recompute_sizes(self, switch: str, frames: int) -> list[int]:
        if switch == "joint":
            return [frames]
        sizes = [frames % self.chunk] if frames % self.chunk else []
        return sizes + [self.chunk] * (frames // self.chunk)

    def _switch_passes(self, switch: str, at: int, window: FrameWindow) -> int:
        """Passes of a switch, which the window has behind it afterwards."""
        config = self.branches.spec.config
        if switch == "flush" or switch == "cut" and config.cut_flush:
            window.flush()
        if switch not in RECOMPUTING:
            return 0
        window.restart(at, config.global_sink)
        sizes = self._recompute_sizes(switch, at - window.end)
        window.end = at
        return len(sizes)
