"""A run whose prompts a schedule says: what of it the chunks are made with is a function of their numbers alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch

from ..config import CacheConfig, SamplingConfig
from ..schedules.schedule import Plan, Segment
from .blend import blend_prompts
from .history import RECOMPUTING
from .session import RollingSession
from .state import Chunk


def switch_of(segment: Segment, cache: CacheConfig) -> str | None:
    """How a segment begins, as a session says it: one of `config.SWITCHES`, or None for the family's own way."""
    if segment.switch != "recache":
        return segment.switch
    return cache.switch if cache.switch in RECOMPUTING else "causal"


def check_plan(plan: Plan, sampling: SamplingConfig, cache: CacheConfig) -> None:
    """Raise ValueError, with the prompt's time, for a switch in the plan that the cache's rules cannot do."""
    for number, segment in plan.begins:
        switch = switch_of(segment, cache)
        if switch is None:
            continue
        try:
            cache.check_switch(switch)
            sampling.check_cache(replace(cache, switch=switch))
        except ValueError as error:
            raise ValueError(f"the schedule, at {plan.grid.seconds(number):g} s, {segment.words}: {error}") from None


class Cue(NamedTuple):
    """What one chunk is made with: embeddings [1 or B, L, D] of the CPU, and how to switch to them."""

    prompt: torch.Tensor
    switch: str | None


def cues(
    plan: Plan, embeds: Mapping[str, torch.Tensor], cache: CacheConfig, before: torch.Tensor | None = None
) -> Iterator[Cue]:
    """A cue for each chunk that the run makes.

    embeds: embeddings [1, L, D] of each of the plan's texts, in the model's dtype.
    before: those of the chunk before chunk number 0, for a blend that begins there.
    """
    return islice(_all_cues(plan, embeds, cache, before), plan.first, None)


def _all_cues(plan: Plan, embeds: Mapping[str, torch.Tensor], cache: CacheConfig, current) -> Iterator[Cue]:
    coming: list[torch.Tensor] = []
    blending = False
    for segment in plan.segments():
        switch = None
        if segment is not None:
            new = embeds[segment.text]
            coming = blend_prompts(new if current is None else current, new, segment.blend, segment.curve)
            blending, switch = segment.blend > 1, switch_of(segment, cache)
        if coming:
            current, *coming = coming
            switch = "hold" if blending else switch
        yield Cue(current, switch)


def generate_scheduled(
    session: RollingSession,
    plan: Plan,
    embeds: Mapping[str, torch.Tensor],
    *,
    negative: torch.Tensor | None = None,
    seed: int = 0,
    **settings,
) -> Generator[Chunk, None, None]:
    """Make the chunks of a plan in an open session, each with the prompt that the schedule has for it.

    The same schedule makes the same video in one run and in several that continue each other, if its times count from
    the video's beginning, however it is cut: also where a blend is.

    plan: for the frames that the session's state has.
    embeds: embeddings [1, L, D] of each of the plan's texts.
    negative: embeddings of the negative prompt; needed with guidance only.
    seed, settings: of `RollingSession.generate`.

    Raises ValueError, before anything is sampled, for a switch that the cache's rules cannot do.
    """
    check_plan(plan, session.sampling, session.cache_config)
    fitted = {text: embeds[text].to("cpu", session.dtype) for text in plan.texts}
    state = session.state
    before = state.prompts[state.records[-1].prompt].to(session.dtype) if state.records and plan.grid.base else None
    made, last = session.generate(plan.chunks, seed, **settings), None
    for prompt, switch in cues(plan, fitted, session.cache_config, before):
        if prompt is not last or switch is not None:
            session.set_prompt(prompt, negative, switch)
        last = prompt
        yield next(made)
