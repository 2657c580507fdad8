"""Changing a video while it is made: what is said live becomes a part of the run's plan, as if its schedule had said it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from threading import Condition
from typing import TypeVar

import torch

from ..config import CacheConfig, SamplingConfig
from ..messages import printable, shortened
from ..schedules.canonical import read_prompt
from ..schedules.reading import read_schedule
from ..schedules.schedule import WORDS, Plan, PromptSchedule, Segment
from .scheduled import check_segment

logger = logging.getLogger(__name__)

HEED_SECONDS = 0.1
"""How often a run that is paused looks whether it was cancelled."""
Made = TypeVar("Made")
Shot = tuple[torch.Tensor, torch.Tensor | None]
"""Embeddings of a prompt, as `TextEncoder.encode_shot` makes them."""


class Steering:
    """What may be said to a run while it goes on, by other threads than the one that samples: they never wait for it.

        steering = Steering(plan, encode, sampling, cache)
        for chunk in steering.heeded(generate_scheduled(session, plan, embeds, steering=steering), plan.chunks):
            ...

    A prompt that is said takes its place in the plan with the next chunk, and holds until the schedule's next one. So
    `schedule`, rendered from where the run began, makes the same video bit for bit.

    plan: of the run.
    encode: makes a text embeddings; called by the thread that samples, between two chunks; whatever it raises leaves the video as it was.
    sampling, cache, marker: rules of the run, as `check_plan` has them.
    refusal: why no prompt can be said, as a sentence; the other parameters are then not needed.

    heed: called while the run is paused; whatever it raises cancels the run.
    idle: gives a context that the run is in while it is paused.
    changed: whether the video has become another one than was planned.
    failure: why the last prompt did not come into the video, as a sentence.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        encode: Callable[[str], Shot] | None = None,
        sampling: SamplingConfig | None = None,
        cache: CacheConfig | None = None,
        marker: str = "",
        *,
        refusal: str = "",
    ):
        self.refusal = refusal
        self.heed: Callable[[], None] = lambda: None
        self.idle: Callable[[], AbstractContextManager] = nullcontext
        self.changed = False
        self.failure = ""
        self._plan, self._encode = plan, encode
        self._rules = sampling or SamplingConfig(), cache or CacheConfig(), marker
        self._next = plan.first + 1 if plan is not None else 0  # number of the first chunk that can still be changed
        self._waiting: Segment | None = None
        self._paused = self._stopped = False
        self._ended: int | None = None  # chunks of a run that was stopped
        self._condition = Condition()

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def words(self) -> tuple[str, ...]:
        """How a prompt can begin here, as brackets of a schedule have it, and "" for the family's own way; also blends."""
        return (
            () if self.refusal else tuple(word for word in ("", *WORDS) if self._can(Segment("…", 0.0, word or None)))
        )

    @property
    def schedule(self) -> PromptSchedule | None:
        """What was done and what is planned; None where no prompt can be said. Its times count from `plan.origin`.

        A run that was stopped ends there, but for the joint sampler: chunks that it had begun were seen by the last ones.
        """
        with self._condition:
            if self._plan is None:
                return None
            sampling, *_ = self._rules
            return self._plan_with(self._waiting).written(None if sampling.joint else self._ended)

    @property
    def origin(self) -> str:
        """From where times of the schedule count: the "video" or the "run"."""
        return "video" if self._plan is None else self._plan.origin

    def prompt(self, text: str, how: str = "") -> str:
        """Have the next chunk begin with a prompt; one that still waits gives way to it.

        how: it begins, as brackets of a schedule have it: "hold", "recache", "flush", "cut", "blend 3" or "slerp 3"; empty
            for the family's own way, or for the brackets at the end of the text.

        Returns its text as a schedule has it. Raises ValueError for what no schedule can have or the cache's rules cannot
        do, and where no chunk is left.
        """
        if self.refusal:
            raise ValueError(self.refusal)
        segment = read_prompt(text, how)
        check_segment(segment, *self._rules)
        with self._condition:
            plan = self._planned
            if self._stopped or self._next >= plan.first + plan.chunks:
                raise ValueError("the last chunk of this run is being made: no other prompt can begin in it")
            written = self._plan_with(segment).written()
            if read_schedule(str(written)).segments != written.segments:
                raise ValueError("this prompt cannot stand in a schedule: write it without colons and brackets")
            self._waiting, self.failure = segment, ""
        return segment.text

    def pause(self) -> None:
        """Have the run wait before its next chunk."""
        with self._condition:
            self._paused = True

    def resume(self) -> None:
        """Have it go on."""
        with self._condition:
            self._paused = False
            self._condition.notify_all()

    def stop(self) -> None:
        """Have it end well after the chunk that is being made: it just has fewer."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def closed(self) -> Steering:
        """What is left to be told of a run that has ended; nothing can be said to it, and it holds no model."""
        left = Steering(None, None, *self._rules, refusal=self.refusal or "the run has ended")
        left._plan, left._ended, left.failure = self._plan, self._ended, self.failure
        return left

    def heeded(self, made: Iterator[Made], chunks: int) -> Iterator[Made]:
        """The chunks of a run, which waits between two of them while it is paused, and ends where it is stopped.

        chunks: how many they are.
        """
        for number, chunk in enumerate(made, 1):
            yield chunk
            if number == chunks:
                continue
            if self._paused and not self._stopped:
                with self.idle():
                    self._wait()
            with self._condition:
                if self._stopped:
                    self._ended, self.changed = number, True
                    return

    def take(self, number: int) -> tuple[Plan, str, Shot] | None:
        """What was said before chunk `number`, which begins now: the plan with it, its text and embeddings.

        None where there is nothing. For the thread that samples.
        """
        with self._condition:
            before = plan = self._planned
            segment, self._waiting, self._next = self._waiting, None, number + 1
            if segment is None:
                return None
            self._plan = plan = before.with_prompt(number, segment)
        try:
            assert self._encode is not None
            shot = self._encode(segment.text)
        except Exception as error:  # what was made is worth more than a prompt that came later
            with self._condition:
                self._plan = before
                self.failure = f'"{shortened(printable(segment.text), 40)}" could not be encoded: {error}'
            logger.warning("%s", self.failure)
            return None
        self.changed = True
        return plan, segment.text, shot

    def _wait(self) -> None:
        while True:
            with self._condition:
                if self._condition.wait_for(lambda: self._stopped or not self._paused, HEED_SECONDS):
                    return
            self.heed()

    def _plan_with(self, segment: Segment | None) -> Plan:
        """The plan with what is to begin with the next chunk."""
        return self._planned if segment is None else self._planned.with_prompt(self._next, segment)

    @property
    def _planned(self) -> Plan:
        assert self._plan is not None  # there is one wherever no refusal is
        return self._plan

    def _can(self, segment: Segment) -> bool:
        try:
            check_segment(segment, *self._rules)
        except ValueError:
            return False
        return True
