"""A run whose prompts a schedule says: what of it the chunks are made with is a function of their numbers alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..config import CacheConfig, SamplingConfig
from ..schedules.schedule import Plan, Segment
from .blend import blend_prompts
from .history import RECOMPUTING
from .session import RollingSession
from .state import Chunk

if TYPE_CHECKING:
    from .steering import Steering

Embeds = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
"""Of each prompt, as `TextEncoder.encode_shot` makes them: for its first chunk, and for those behind it where they are others."""


def switch_of(segment: Segment, cache: CacheConfig, marker: str = "") -> str | None:
    """How a segment begins, as a session says it: one of `config.SWITCHES`, or None for the family's own way.

    marker: how prompts begin that begin a shot, as `ModelPreset.cut_marker` has it.
    """
    if segment.blend > 1:
        return "hold"
    if segment.switch == "recache":
        return cache.switch if cache.switch in RECOMPUTING else "causal"
    if segment.switch is None and marker and segment.text.startswith(marker):
        return "cut"
    return segment.switch


def switches_of(plan: Plan, cache: CacheConfig, marker: str = "") -> set[str]:
    """What may be done to the cache on the way, of `config.SWITCHES`."""
    begun = plan.grid.base > 0  # what chunk 0 begins with is a switch only behind other frames
    return {switch_of(segment, cache, marker) or cache.switch for number, segment in plan.begins if number or begun}


def check_plan(plan: Plan, sampling: SamplingConfig, cache: CacheConfig, marker: str = "") -> None:
    """Raise ValueError, with the prompt's time, for a switch in the plan that the cache's rules cannot do."""
    for number, segment in plan.begins:
        try:
            check_segment(segment, sampling, cache, marker)
        except ValueError as error:
            where = f"the schedule, at {plan.grid.seconds(number):g} s, {segment.words or '[cut]'}"
            raise ValueError(f"{where}: {error}") from None


def check_segment(segment: Segment, sampling: SamplingConfig, cache: CacheConfig, marker: str = "") -> None:
    """Raise ValueError where the cache's rules cannot do what a prompt begins with."""
    switch = switch_of(segment, cache, marker)
    if switch is not None:
        cache.check_switch(switch)
        sampling.check_cache(replace(cache, switch=switch))


class Cue(NamedTuple):
    """What one chunk is made with: embeddings [1 or B, L, D] of the CPU, and how to switch to them."""

    prompt: torch.Tensor
    switch: str | None


def cues(
    plan: Plan, embeds: Embeds, cache: CacheConfig, marker: str = "", before: torch.Tensor | None = None
) -> Iterator[Cue]:
    """A cue for each chunk that the run makes.

    before: embeddings of the chunk before chunk number 0, for a blend that begins there.
    """
    return islice(_all_cues(plan, embeds, cache, marker, before), plan.first, None)


def _all_cues(
    plan: Plan, embeds: Embeds, cache: CacheConfig, marker: str, before: torch.Tensor | None
) -> Iterator[Cue]:
    current, coming = before, []
    for segment in plan.segments():
        if segment is not None:
            new, after = embeds[segment.text]
            mixed = blend_prompts(new if current is None else current, new, segment.blend, segment.curve)
            coming = [Cue(mixed[0], switch_of(segment, cache, marker)), *(Cue(prompt, "hold") for prompt in mixed[1:])]
            if after is not None and marker:
                coming.append(Cue(after, "hold"))
        if coming:
            cue, *coming = coming
            current = cue.prompt
            yield cue
        elif current is not None:  # the first chunk of a plan begins a segment
            yield Cue(current, None)


def generate_scheduled(
    session: RollingSession,
    plan: Plan,
    embeds: Embeds,
    *,
    negative: torch.Tensor | None = None,
    seed: int | Sequence[int] = 0,
    steering: Steering | None = None,
    **settings,
) -> Generator[Chunk, None, None]:
    """Make the chunks of a plan in an open session, each with the prompt that the schedule has for it.

    The same schedule makes the same video in one run and in several that continue each other, if its times count from
    the video's beginning, however it is cut: also where a blend is.

    plan: for the frames that the session's state has.
    embeds: of each of the plan's texts.
    negative: embeddings of the negative prompt; needed with guidance only.
    seed, settings: of `RollingSession.generate`.
    steering: of this plan. What is said to it begins with the next chunk; with the second, while there is none yet.

    Raises ValueError, before anything is sampled, for a switch that the cache's rules cannot do.
    """
    marker = session.model.preset.cut_marker
    check_plan(plan, session.sampling, session.cache_config, marker)

    def fitted(first: torch.Tensor, after: torch.Tensor | None = None):
        return first.to("cpu", session.dtype), None if after is None else after.to("cpu", session.dtype)

    ready = {text: fitted(*embeds[text]) for text in plan.texts}
    state, before = session.state, None
    if state.records and plan.grid.base:
        before, _ = fitted(state.prompts[state.records[-1].prompt])
    made, last = session.generate(plan.chunks, seed, **settings), None
    coming = cues(plan, ready, session.cache_config, marker, before)
    for number in range(plan.first, plan.first + plan.chunks):
        # The first chunk has its prompt already: frames that were given have entered with it.
        if steering is not None and number > plan.first and (said := steering.take(number)) is not None:
            edited, text, shot = said
            ready[text] = fitted(*shot)
            coming = islice(cues(edited, ready, session.cache_config, marker, before), number - plan.first, None)
        prompt, switch = next(coming)
        if prompt is not last or switch is not None:
            session.set_prompt(prompt, negative, switch)
        last = prompt
        yield next(made)
