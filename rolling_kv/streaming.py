"""A video on its way to disk: each finished chunk is journalled, decoded and encoded while the next one is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Event, Thread

import torch

from .atomic import claiming
from .devices import beside
from .growing import GrowingVideo, growing_place, whole_length
from .sampling.journal import SUFFIX as JOURNAL_SUFFIX
from .sampling.journal import Journal
from .sampling.state import CacheState
from .sampling.state_file import SUFFIX, check_state_path, save_state
from .vae.latents import to_raw
from .vae.loading import AnyVAE
from .video import to_uint8

ENDLESS_SECONDS = 7 * 24 * 3600.0
"""How long a video becomes that is made until somebody stops it, where a number is needed."""
WAITING = 4
"""Pieces of work that may wait for the thread that writes: what is made faster than it is written waits, too."""


def journal_place(path: str | Path) -> Path:
    """Where the journal of a video lies while it grows."""
    return Path(path).with_suffix(JOURNAL_SUFFIX)


def check_ended(path: str | Path, journal_in: str | Path | None = None, new_only: bool = False) -> bool:
    """Raise FileExistsError where a run that made the video of that name did not end, so that its chunks are not lost.

    journal_in: what is continued. new_only: whether the video is to hold what follows alone.
    Returns whether that is the journal of that very run. Raises ValueError where nothing else would hold its chunks.
    """
    if not Path(path).name:
        return False  # what is no name is told by who writes to it
    left = journal_place(path)
    resumed = journal_in is not None and Path(journal_in).resolve() == left.resolve()
    if os.path.exists(left) and not resumed:  # False for names that are too long
        raise FileExistsError(
            f"{left.with_suffix('.mp4').name} was being made by a run that did not end: what it shows is in "
            f"{growing_place(path)}, and its state in {left}. Continue from that state (--state-in), or delete the two files to begin "
            "anew, or choose another name"
        )
    grown = growing_place(path)
    if not resumed and os.path.isfile(grown) and whole_length(grown):
        raise FileExistsError(f"{grown} would be written over, and it holds a video: move it, or choose another name")
    if resumed and new_only:
        raise ValueError(
            f"{left} is all that is left of {left.with_suffix('.mp4').name}, and would be lost if that held only what is new: "
            "choose another name, or have the whole video written"
        )
    return resumed


class VideoStream:
    """Writes one video while it is made, in constant memory, and never loses a chunk that is finished.

    A context manager:

        with VideoStream("out.mp4", vae, 480, 832) as stream, session:
            for _ in session.generate(100):
                session.state = stream.add(session.state)

    While it grows, the video is NAME.growing.mp4, which plays, and its state NAME.journal. At the end it takes its name, and
    the journal goes. When the block ends with an error, a cancelled run included, and a chunk was made, what is finished
    becomes the video all the same, and its state is kept: `kept` says where. Where none was made, nothing is left. A run
    that is killed leaves the growing video and the journal.

    path: ends in .mp4; an earlier video is untouched until the end.
    vae: decodes; on CUDA in a thread and a stream of its own, beside the sampling.
    height, width: pixels.
    before: the state that is continued. journal_in: the journal that it was read from, if it was one.
    new_only: leave the frames of that state out of the video.
    state_out: file for the state, .safetensors; by default one is kept only where the block fails, beside the video.
    on_frames: called as on_frames(number, frames) with the frames of each latent frame that is written, uint8 [T, H, W, 3] in
        CPU memory, in their order; in whichever thread decodes.
    settings: of `GrowingVideo`: fps, crf, scale, metadata, encoder.

    Raises FileExistsError where an earlier run of this name did not end, and what `GrowingVideo` raises. An error of the
    thread that writes is raised by the next `add`, or on leaving.
    """

    def __init__(
        self,
        path: str | Path,
        vae: AnyVAE,
        height: int,
        width: int,
        *,
        before: CacheState | None = None,
        journal_in: str | Path | None = None,
        new_only: bool = False,
        state_out: str | Path | None = None,
        on_frames: Callable[[int, torch.Tensor], None] | None = None,
        **settings,
    ):
        before = before or CacheState()
        settings.setdefault("fps", vae.geometry.fps)
        self._growing = GrowingVideo(path, width, height, **settings)
        self.path = self._growing.path
        self._state_out = None if state_out is None else check_state_path(state_out)
        self._journal = Journal(journal_place(self.path))
        self._resumed = check_ended(self.path, journal_in, new_only)
        self._journal_in = journal_in
        self._decoder = vae.decoder()
        self._on_frames = on_frames
        self._beside = beside(vae.compute_device())
        self._generated = before.generated
        self._written_from = before.frames if new_only else 0
        self._warm_from = max(self._written_from - vae.reach, 0)  # what comes before changes no pixel that is written
        self._chunks = self._frames = 0  # that were looked at, and the latent frames in them
        self._state = before
        self.state_file: Path | None = None
        """Where the state is, once the block has ended."""

    @property
    def state(self) -> CacheState:
        """As of the last `add`."""
        return self._state

    @property
    def kept(self) -> str:
        """Where what is finished is, as a sentence; empty as long as there is nothing."""
        if self.state_file is None:
            return ""
        return (
            f"the {self._state.seconds:g} s that are done are in {self._growing.place}, and their state in {self.state_file}: "
            "Load State, or --state-in, goes on from it"
        )

    @property
    def note(self) -> str:
        """What is to be said of how the video is encoded; empty mostly."""
        return self._growing.note

    @property
    def video(self) -> Path:
        """The file as it is now: the growing one, or the finished one."""
        return self._growing.place

    def add(self, state: CacheState) -> CacheState:
        """Put on disk what is new in a state. Returns the same state, with chunks that hold no memory where they may.

        Raises OSError where the journal, or what was given before, cannot be written.
        """
        try:
            self._state = self._journal.add(state)
        except OSError as error:
            raise OSError(f"cannot write {self._journal.path}: {error.strerror or error}") from error
        for chunk in self._state.chunks[self._chunks :]:
            first, self._frames = self._frames, self._frames + chunk.shape[2]
            if self._frames > self._warm_from:
                skipped = max(self._warm_from - first, 0)
                self._send(chunk[:, :, skipped:], first + skipped)
        self._chunks = len(self._state.chunks)
        return self._state

    def settle(self) -> None:
        """Wait until what was added is decoded and written: the VAE is not in use then, until more is added."""
        self._work.settle()

    def _send(self, latents: torch.Tensor, first: int) -> None:
        """Have model latents [1, C, f, h, w] decoded and written, of which the first is the video's latent frame `first`."""
        latents = to_raw(latents.float())
        if self._beside is not None:
            self._work.put(partial(self._decode_beside, self._beside.after_all(), latents, first))
        else:
            self._decode(latents, first, lambda frames: self._work.put(partial(self._growing.write, frames)))

    def _decode_beside(self, turn: AbstractContextManager, latents: torch.Tensor, first: int) -> None:
        with turn:
            self._decode(latents, first, self._growing.write)

    def _decode(self, latents: torch.Tensor, first: int, write: Callable[[torch.Tensor], None]) -> None:
        with torch.inference_mode():
            for number, frames in enumerate(self._decoder.decode_frames(latents), first):
                if number >= self._written_from:
                    pictures = to_uint8(frames[0]).permute(1, 2, 3, 0).cpu()
                    write(pictures)
                    if self._on_frames is not None:
                        self._on_frames(number, pictures)

    def __enter__(self) -> VideoStream:
        with ExitStack() as claimed:
            claimed.enter_context(claiming(self._growing.growing, what="video"))
            check_ended(self.path, self._journal_in)
            self._growing.__enter__()
            self._work = _Worker(WAITING)
            self._claim = claimed.pop_all()
        if self._resumed:  # what the killed run has shown is there again at once
            try:
                self.add(self._state)
            except BaseException as error:
                self.__exit__(type(error), error, error.__traceback__)
                raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._claim:
            self._leave(kind, error, trace)

    def _leave(self, kind, error, trace) -> None:
        made = self._state.generated > self._generated
        if made or self._resumed:  # whatever happens from here on
            self.state_file = self._journal.path
        failed = self._work.close()
        try:
            self._growing.__exit__(kind, error, trace)
        except OSError as full:
            failed = failed or full
        self._journal.__exit__()
        if made:
            self._finish(error or failed)
        elif not self._resumed:
            self._growing.discard()
            self._journal.remove()
        if error is None and failed is not None:
            raise failed

    def _finish(self, ending: BaseException | None) -> None:
        try:
            if self._growing.frames:
                self._growing.finish()
            else:  # the first of them could not be decoded
                self._growing.discard()
            place = self._state_out
            if ending is not None and place is None:
                place = self.path.with_suffix(f".state{SUFFIX}")
            if place is not None:
                save_state(self._state, place)
            self._journal.remove()
            self.state_file = place
        except (OSError, ValueError) as full:
            if ending is None:
                raise OSError(f"{full}; {self.kept}") from full


class _Worker:
    """A thread that does pieces of work in their order, until one of them fails."""

    def __init__(self, waiting: int):
        self._queue: Queue[Callable[[], None] | None] = Queue(waiting)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="rolling_kv video", daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], None]) -> None:
        """Have a piece of work done; waits where too many wait. Raises what an earlier one has raised."""
        if self._error is not None:
            raise self._error
        self._queue.put(task)

    def settle(self) -> None:
        """Wait until everything so far is done."""
        settled = Event()
        self.put(settled.set)
        while not settled.wait(0.1) and self._error is None:
            pass

    def close(self) -> BaseException | None:
        """Wait for all of it; returns what a piece of work has raised."""
        self._queue.put(None)
        self._thread.join()
        return self._error

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                task()
            except BaseException as error:
                self._error = error
            del task  # and the frames in it
