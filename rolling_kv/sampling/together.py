"""Several videos of one model side by side, whose passes run as one batch: each joins and leaves at a chunk's border."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import torch

from ..cache.prompt import Branch
from ..checkpoints.model import CausalModel
from ..config import ExecutionConfig
from ..wan.attachment import RollingAttachment, apply_rolling_kv_cache
from .session import RollingSession
from .state import CacheState, Chunk


class Together:
    """One model for several videos. A context manager: the model has its caches attached inside it, and only there.

        with Together(model) as together:
            for prompt in prompts:
                together.join(prompt, chunks=20, height=480, width=832)
            for stream, chunk in together.chunks():
                ...

    model: as for a `RollingSession`, and changed like that.
    execution: how passes are computed, for all videos.

    Each video is a session in a thread of its own, which waits wherever a pass is due. Once all wait, those passes are run as one
    that have the same shape and the same timesteps: context passes first, then the noisiest, so that a video which joins comes into step
    with the others within its first chunk. Window, prompt, seed, switches and length are each video's own, and it is what it would be
    alone, up to what the number of rows changes in the rounding of a matrix product.
    """

    def __init__(self, model: CausalModel, execution: ExecutionConfig | None = None):
        self.model = model
        self.execution = execution or ExecutionConfig()
        if self.execution.cuda_graphs:
            raise ValueError("CUDA graphs are for passes of one video: turn them off where several run together")
        self._attachments: list[RollingAttachment] = []
        self._streams: list[Stream] = []
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._waiting: dict[Stream, _Pass] = {}  # whose passes are to be run

    def join(self, prompt: torch.Tensor, chunks: int, seed: int = 0, **settings) -> Stream:
        """Let a video begin, or go on, with the next pass. prompt, settings: of a `RollingSession`; chunks, seed: of its `generate`.

        Raises ValueError for what a session cannot be, and for a step cache, which judges pass by pass.
        """
        if not self._attachments:
            raise ValueError("nobody is together yet: join inside `with together:`")
        if settings.get("step_cache") is not None:
            raise ValueError("a step cache cannot go with videos whose passes run as one: leave it out")
        session = RollingSession(
            self.model, prompt, execution=self.execution, attach=lambda weights: self._seat(stream, weights), **settings
        )
        stream = Stream(session, chunks, seed, self._events)
        self._streams.append(stream)
        stream.thread.start()
        return stream

    def chunks(self) -> Iterator[tuple[Stream, Chunk]]:
        """Make all videos, and give each chunk of any of them as it is done. Others may join meanwhile, and leave.

        A video that fails leaves the others alone: its `error` says why. Ends when no video is left.
        """
        waiting = self._waiting
        try:
            while self._streams:
                while len(waiting) < len(self._streams):
                    stream, event = self._events.get()
                    if isinstance(event, _Pass):
                        waiting[stream] = event
                    elif event is None:
                        self._streams.remove(stream)
                    else:
                        yield stream, event
                if waiting:
                    self._run(_next_group(waiting), waiting)
        finally:
            self._end()

    def _end(self) -> None:
        """Have all videos end where they are, and their threads."""
        for stream in list(self._streams):
            stream.leave()
        while self._waiting:
            self._waiting.popitem()[0].answer(_Left())
        while self._streams:
            stream, event = self._events.get()
            if event is None:
                self._streams.remove(stream)
            elif isinstance(event, _Pass):
                stream.answer(_Left())

    def _run(self, group: Sequence[Stream], waiting: dict[Stream, _Pass]) -> None:
        passes = [waiting.pop(stream) for stream in group]
        first = passes[0]
        try:
            with torch.inference_mode():
                flows: Sequence[Any] = first.attachment.forward_together(
                    [one.latents for one in passes], first.timestep, [one.branch for one in passes],
                    time_rows=first.time_rows, keys_only=first.keys_only,
                )  # fmt: skip
        except Exception as error:
            flows = [error] * len(group)
        except BaseException:  # Ctrl-C: who waits for this pass has to be told like all others
            for stream in group:
                stream.answer(_Left())
            raise
        for stream, flow in zip(group, flows):
            stream.answer(flow)

    def _seat(self, stream: Stream, weights) -> _Seat:
        (attachment,) = [one for one in self._attachments if one.transformer is weights]
        return _Seat(stream, attachment)

    def __enter__(self) -> Together:
        with ExitStack() as ending:
            for weights in self.model.transformers:
                self._attachments.append(apply_rolling_kv_cache(weights, self.execution))
                ending.callback(self._attachments[-1].detach)
            ending.callback(self._attachments.clear)
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._end()  # also of those whose chunks nobody has asked for
        finally:
            self._ending.__exit__(*exception)


class Stream:
    """One of the videos. session: its own; `session.set_prompt` holds from its next chunk on.

    error: what has ended it before its last chunk; None where nothing has.
    """

    def __init__(self, session: RollingSession, chunks: int, seed: int, events: SimpleQueue[_Event]):
        self.session = session
        self.error: BaseException | None = None
        self.thread = Thread(target=self._work, args=(chunks, seed), name="rolling_kv stream", daemon=True)
        self._events = events
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._leaving = False

    @property
    def state(self) -> CacheState:
        """The video so far."""
        return self.session.state

    def leave(self) -> None:
        """End with the chunk that is being made."""
        self._leaving = True

    def answer(self, flow: Any) -> None:
        """Give what a pass was waited for, or an error that it ended with."""
        self._answers.put(flow)

    def run_pass(self, wanted: _Pass) -> Any:
        """Wait until somebody has run a pass, and return the flow."""
        self._events.put((self, wanted))
        flow = self._answers.get()
        if isinstance(flow, BaseException):
            raise flow
        return flow

    def _work(self, chunks: int, seed: int) -> None:
        try:
            with self.session:
                for chunk in self.session.generate(chunks, seed):
                    self._events.put((self, chunk))
                    if self._leaving:
                        break
        except _Left:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._events.put((self, None))


class _Left(Exception):
    """Nobody runs passes any more."""


@dataclass(eq=False)
class _Pass:
    """A pass that a video waits for; see `RollingAttachment.forward`."""

    attachment: RollingAttachment
    latents: torch.Tensor
    timestep: Any
    branch: Branch
    time_rows: int | None
    keys_only: bool
    kind: tuple = field(init=False)

    def __post_init__(self):
        times = tuple(self.timestep) if isinstance(self.timestep, Sequence) else self.timestep
        rows, text = self.time_rows or self.latents.shape[2], tuple(self.branch.prompt.embeds.shape[1:])
        self.kind = id(self.attachment), tuple(self.latents.shape[1:]), times, rows, self.keys_only, text

    @property
    def rank(self) -> tuple[bool, float]:
        """Greater for those that are to be run first."""
        noisiest = max(self.timestep) if isinstance(self.timestep, Sequence) else self.timestep
        return self.keys_only, float(noisiest)


_Event = tuple[Stream, "_Pass | Chunk | None"]
"""What a video waits for, has made, or None at its end."""


def _next_group(waiting: dict[Stream, _Pass]) -> list[Stream]:
    """The videos whose passes are run next, as one."""
    kind = max(waiting.values(), key=lambda one: one.rank).kind
    return [stream for stream, one in waiting.items() if one.kind == kind]


class _Seat(NamedTuple):
    """What a session takes for its attachment: passes go to whoever runs those of all."""

    stream: Stream
    attachment: RollingAttachment

    def forward(self, latents, timestep, branch, *, time_rows=None, keys_only=False, once=False):
        """once: says nothing here, where no pass is recorded."""
        wanted = _Pass(self.attachment, latents, timestep, branch, time_rows, keys_only)
        return self.stream.run_pass(wanted)

    def predict(self, latents, timestep, branch) -> torch.Tensor:
        return self.forward(latents, timestep, branch)

    def detach(self) -> None:
        """The attachment is everybody's: it stays."""
