"""What the next chunk of a session is made with, and how its cache is switched to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from ..config import MOST_FRAMES, CacheConfig, SamplingConfig, check_whole
from .blend import blend_prompts
from .denoiser import needed_negative
from .state import CacheState, same_values


class Wanted(NamedTuple):
    """What the next chunk is to be made with: embeddings [B, L, D] on the CPU, and how to switch to them.

    coming: the prompts of the chunks after it, where they are others: a blend, or a shot that the first one begins.
    """

    prompt: torch.Tensor
    negative: torch.Tensor | None
    switch: str | None = None
    coming: tuple[torch.Tensor, ...] = ()

    def following(self) -> Wanted:
        """What the chunk after it is to be made with: a switch is done once, and nothing on the way of a blend."""
        if not self.coming:
            return self._replace(switch=None)
        return Wanted(self.coming[0], self.negative, "hold", self.coming[1:])


class Prompting:
    """The prompts of one session, chunk by chunk.

    fitted: makes of given embeddings, and what to call them in a message, those that the model takes: [B, L, D] on the CPU.
    sampling, cache: the session's settings.
    wanted: what the next chunk is to be made with.
    begun: the prompt of the chunk that was begun last; None where there is none.
    """

    wanted: Wanted

    def __init__(
        self,
        fitted: Callable[[torch.Tensor, str], torch.Tensor],
        sampling: SamplingConfig,
        cache: CacheConfig,
        state: CacheState,
    ):
        self.sampling = sampling
        self.cache = cache
        self._fitted = fitted
        self.begun = self._last_of(state) if state.records else None

    def want(
        self,
        prompt: torch.Tensor,
        negative: torch.Tensor | None,
        switch: str | None,
        after: torch.Tensor | None,
        blend: int,
        curve: str,
    ) -> None:
        """Change what the next chunk is made with; see `RollingSession.set_prompt`."""
        if switch is not None:
            self.cache.check_switch(switch)
            self.sampling.check_cache(replace(self.cache, switch=switch))
        check_whole("blend", blend, 1, MOST_FRAMES, "chunk")
        if blend > 1 and switch not in (None, "hold"):
            raise ValueError(
                f'a blend over {blend} chunks changes the prompt little by little, where a "{switch}" has no place: leave '
                "one of them out"
            )
        negative = needed_negative(self.sampling, negative)
        # Copies of its own, which the state takes over: the caller may go on to change what was given.
        fitted = self._fitted(prompt, "the prompt").clone()
        fitted_negative = None if negative is None else self._fitted(negative, "the negative prompt").clone()
        coming: tuple[torch.Tensor, ...] = ()
        if blend > 1:
            old = self.wanted.prompt if self.begun is None else self.begun
            (fitted, *rest), switch = blend_prompts(old, fitted, blend, curve), "hold"
            coming = tuple(rest)
        if after is not None:
            coming = (*coming, self._fitted(after, "the prompt after the next chunk").clone())
        self.wanted = Wanted(fitted, fitted_negative, switch, coming)

    def next_switch(self, state: CacheState) -> str:
        """What is done to the cache before the next chunk of a video; empty for nothing."""
        if not state.records:
            return ""
        switch = self.wanted.switch
        if switch is None:
            switch = "hold" if same_values(self._last_of(state), self.wanted.prompt) else self.cache.switch
        return "" if switch == "hold" else switch

    def begin(self) -> Wanted:
        """What the chunk that begins now is made with. Others may be wanted while it is made, for the next one."""
        self.begun = self.wanted.prompt
        return self.wanted

    def done(self, wanted: Wanted) -> None:
        """The chunk that was begun with this is done: go on to what follows it, unless something else is wanted by now."""
        if self.wanted is wanted:
            self.wanted = wanted.following()

    def given(self, wanted: Wanted) -> None:
        """Frames that were given have entered with this. What comes after it waits for the next generated chunk."""
        self.wanted = wanted._replace(switch="hold") if wanted.coming else wanted.following()

    def _last_of(self, state: CacheState) -> torch.Tensor:
        prompt = state.prompts[state.records[-1].prompt]
        return self._fitted(prompt, "a prompt of the cache state").contiguous()
