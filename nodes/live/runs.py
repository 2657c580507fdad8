"""The runs that this server makes and has made lately, as pages are told of them."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock, RLock
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from ...rolling_kv.cache.window import FrameWindow
from ...rolling_kv.geometry import Geometry
from ...rolling_kv.sampling.steering import Steering
from ...rolling_kv.strips import Strip, StripThread, make_strip

ROUTE = "/rolling_kv"
ACTIONS = ("prompt", "pause", "resume", "stop")
ENDED = 4
"""Runs that are told of after their end."""
STRIP_BYTES = 64 * 2**20
"""Most bytes of all strips together; the oldest go first."""
STRIP = ("frames", "seconds", "width", "height", "columns")
"""What pages are told of a strip."""
RECENT = 8
"""Chunks over which the rate is measured."""


class Preview(Protocol):
    """Makes pictures of latents; those of `rolling_kv.previews` do."""

    def pictures(self, between: Callable[[int, int], torch.Tensor], first: int, last: int) -> torch.Tensor:
        """uint8 [T, H, W, 3] of the latent frames from `first` up to `last`. between: gives model latents of such frames."""
        ...


class Steered(Protocol):
    """What may be said to a run; a `Job` is one."""

    steering: Steering

    def say(self, text: str, how: str) -> str:
        """Have the next chunk begin with a prompt; returns what is to be said of its words. Raises ValueError."""
        ...


class PreviewSettings(NamedTuple):
    """What the pages' settings say. on: whether there are pictures. size: most pixels along their longer side."""

    on: bool = True
    size: int = 256


class Runs:
    """All that is known of runs. May be used from any thread.

    send: called as send(event, data) to tell every page.
    """

    def __init__(self, send: Callable[[str, dict], None]):
        self.send = send
        self.settings = PreviewSettings()
        self.steered: dict[str, str] = {}
        """The last run of each node that did not make what its inputs say."""
        self._lock = Lock()
        self._runs: dict[str, Run] = {}  # in the order in which they began
        self._strips: dict[tuple[str, int], Strip] = {}  # in the order in which they were made

    def get(self, run_id: str) -> Run | None:
        """The run of that id, if it is known."""
        with self._lock:
            return self._runs.get(run_id)

    def listed(self) -> list[dict]:
        """All runs that are known, the oldest first."""
        with self._lock:
            runs = list(self._runs.values())
        return [{**run.about(), "strips": self.strips_of(run)} for run in runs]

    def strip(self, run_id: str, chunk: int) -> Strip | None:
        """The strip of a chunk, if it is still there."""
        with self._lock:
            return self._strips.get((run_id, chunk))

    def strips_of(self, run: Run) -> list[dict]:
        """All strips of a run that are still there."""
        with self._lock:
            strips = [(chunk, strip) for (run_id, chunk), strip in self._strips.items() if run_id == run.id]
        return [run.about_strip(*known) for known in strips]

    def add(self, run: Run) -> None:
        with self._lock:
            ended = [known.id for known in self._runs.values() if known.has_ended]
            for known in ended[: max(len(ended) - ENDED, 0)]:
                del self._runs[known]
                self._strips = {key: strip for key, strip in self._strips.items() if key[0] != known}
            self._runs[run.id] = run

    def keep(self, run: Run, chunk: int, strip: Strip) -> None:
        with self._lock:
            self._strips[run.id, chunk] = strip._replace(newest=None)  # not packed, it is larger than all the rest
            while len(self._strips) > 1 and sum(len(kept.data) for kept in self._strips.values()) > STRIP_BYTES:
                del self._strips[next(iter(self._strips))]


class Run:
    """One execution of a node that samples. A context manager: it runs inside, and every page is told how it ends.

        with Run(runs, …) as run, session:
            for chunk in session.generate(…):
                run.show(session)

    runs: where it is entered.
    prompt_id, node, display_node: of the execution, as ComfyUI names them.
    workflow: id of the workflow that it belongs to; None where no page has sent one.
    geometry: of the model. fps: frames per second of the video. size: of the video, width and height in pixels.
    start: latent frames before the first chunk. end: of the whole video; None for one that is made until it is stopped.
    chunks: how many are made; None for one that is made until it is stopped.
    steered: what may be said to it while it goes on, see `Steered`.
    preview: makes the pictures; None where `frames` brings those of the video itself.
    free: bytes that are free on the device.

    """

    def __init__(
        self,
        runs: Runs,
        *,
        prompt_id: str,
        node: str,
        display_node: str,
        geometry: Geometry,
        fps: float,
        size: tuple[int, int],
        start: int,
        end: int | None,
        chunks: int | None,
        steered: Steered,
        preview: Preview | None = None,
        free: Callable[[], int] = lambda: 0,
        workflow: str | None = None,
    ):
        self.id = secrets.token_hex(8)
        self.prompt_id, self.node, self.display_node, self.workflow = prompt_id, node, display_node, workflow
        self.fps, self.size, self.chunks = float(fps), size, chunks
        self._ended = ""
        self._waiting = False
        self._steered: Steered | None = steered
        self._steering = steered.steering
        self._steering.idle = self._idle
        self.chunk = 0
        self.window: dict | None = None
        self._runs, self._geometry, self._preview, self._free = runs, geometry, preview, free
        self._start, self._latents, self._end = start, start, end
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # frames of the last chunks, and their seconds
        self._since = 0.0
        self._pieces: deque[tuple[int, torch.Tensor]] = deque()  # frames of the video that are not in a strip yet
        self._ends: deque[tuple[int, int, int]] = deque()  # chunks that wait for them: number, first latent frame, end
        self._assembling = Lock()
        self._telling = RLock()
        self._newest: Image.Image | None = None

    @property
    def frames(self) -> int:
        """Frames of the video that were made here."""
        return self._pixels(self._latents) - self._pixels(self._start)

    @property
    def has_ended(self) -> bool:
        return bool(self._ended)

    @property
    def status(self) -> str:
        """One of "running", "paused" (before the next chunk), "ended", "failed" and "cancelled"."""
        paused = self._steering.paused and not self._steering.stopped
        return self._ended or ("paused" if paused else "running")

    def about(self) -> dict[str, Any]:
        """All of it but its strips, as JSON."""
        frames, seconds = (sum(column) for column in zip(*self._recent)) if self._recent else (0, 0.0)
        rate = frames / seconds if seconds else 0.0
        left = None if self._end is None or not rate else (self._pixels(self._end) - self._pixels(self._latents)) / rate
        return {
            "run": self.id,
            "prompt_id": self.prompt_id,
            "node": self.node,
            "display_node": self.display_node,
            "workflow": self.workflow,
            "status": self.status,
            "waiting": self._waiting,
            "steerable": self._steering.refusal,
            "switches": list(self._steering.words),
            "chunk": self.chunk,
            "chunks": self.chunks,
            "first_seconds": self._pixels(self._start) / self.fps,
            "fps": self.fps,
            "frames": self.frames,
            "seconds": self.frames / self.fps,
            "rate": rate,
            "left": 0.0 if self.has_ended else left,
            "schedule": str(self._steering.schedule or ""),
            "count_from": "sampler" if self._steering.origin == "run" else "video",
            "failure": self._steering.failure,
            "window": self.window,
            "size": list(self.size),
        }

    def about_strip(self, chunk: int, strip: Strip) -> dict[str, Any]:
        """A strip, as JSON."""
        url = f"{ROUTE}/runs/{self.id}/chunks/{chunk}.webp"
        return {"chunk": chunk, "url": url} | {name: getattr(strip, name) for name in STRIP}

    def tell(self, event: str = "run", **more: Any) -> None:
        """Tell every page how the run is now, in the order in which it came to be so, whichever threads tell it."""
        with self._telling:
            self._runs.send(f"rolling_kv.{event}", self.about() | more)

    def steer(self, action: str, prompt: str = "", how: str = "") -> str:
        """Do what a page asks for: one of ACTIONS. Returns what is to be said of a prompt's words; every page is told.

        Raises ValueError for what cannot be done, and LookupError once the run has ended.
        """
        steered = self._steered
        if steered is None:
            raise LookupError
        remark = steered.say(prompt, how) if action == "prompt" else ""
        if action != "prompt":
            {"pause": self._steering.pause, "resume": self._steering.resume, "stop": self._steering.stop}[action]()
        with self._telling:
            if self.has_ended:  # meanwhile: it is told of no more
                raise LookupError
            self.tell()
        return remark

    def settle(self) -> None:
        """Wait until no picture is being made: what makes them may be moved elsewhere then."""
        self._thread.settle()

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """The run waits inside; the time counts as no work."""
        self._waiting, began = True, time.monotonic()
        self.tell()
        try:
            yield
        finally:
            self._waiting = False
            self._since += time.monotonic() - began
            self.tell()

    def show(self, session) -> None:
        """A chunk is done, by which the session's state has grown. session: a `RollingSession`."""
        state, first, now = session.state, self._latents, time.monotonic()
        self._recent.append((self._pixels(state.frames) - self._pixels(first), now - self._since))
        self._latents, self._since, self.chunk = state.frames, now, self.chunk + 1
        self.window = window_of(session.window, sum(session.cache_bytes), self._free())
        if self._preview is None:
            with self._assembling:
                self._ends.append((self.chunk, first, state.frames))
            self._assemble()
        else:
            self._put(
                self.chunk,
                first,
                state.frames,
                partial(self._preview.pictures, state.frames_between, first, state.frames),
            )

    def see(self, number: int, frames: torch.Tensor) -> None:
        """Take frames of the video itself, uint8 [T, H, W, 3]: those of the latent frame `number`, one after the other."""
        if number >= self._start:
            with self._assembling:
                self._pieces.append((number, frames))
            self._assemble()

    def newest(self) -> tuple[str, Image.Image, int] | None:
        """The newest frame once, as ComfyUI's progress takes it."""
        picture, self._newest = self._newest, None
        return None if picture is None else ("JPEG", picture, self._runs.settings.size)

    def __enter__(self) -> Run:
        self._thread = StripThread(self._made)
        self._since = time.monotonic()
        self._runs.add(self)
        self.tell()
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            # Decoding for its own sake would keep whoever cancels waiting.
            for chunk, *_ in self._ends:  # whose frames did not come
                self._thread.put(chunk, None)
            self._thread.close(finish=kind is None or self._preview is None)
        finally:
            self._pieces.clear()
            # ComfyUI's interrupt is no Exception.
            self._ended = "ended" if kind is None else "failed" if issubclass(kind, Exception) else "cancelled"
            if self._steering.changed:
                self._runs.steered[self.node] = self.id
            # What is told of the run later needs none of its models.
            self._steered, self._preview, self._steering = None, None, self._steering.closed()
            self.tell()

    def _pixels(self, latents: int) -> int:
        return self._geometry.pixel_frames(latents)

    def _assemble(self) -> None:
        """Have strips made of the chunks whose frames are all there; whichever comes last, the frames or the chunk."""
        with self._assembling:
            while self._ends and self._pieces and self._pieces[-1][0] >= self._ends[0][2] - 1:
                chunk, first, end = self._ends.popleft()
                pieces = []
                while self._pieces and self._pieces[0][0] < end:
                    pieces.append(self._pieces.popleft()[1])
                self._put(chunk, first, end, partial(torch.cat, pieces))

    def _put(self, chunk: int, first: int, end: int, pictures: Callable[[], torch.Tensor]) -> None:
        on, size = self._runs.settings
        seconds = (self._pixels(end) - self._pixels(first)) / self.fps
        self._thread.put(chunk, (lambda: make_strip(pictures(), seconds, size)) if on else None)

    def _made(self, chunk: int, strip: Strip | None) -> None:
        about = None
        if strip is not None:
            self._newest = strip.newest
            self._runs.keep(self, chunk, strip)
            about = self.about_strip(chunk, strip)
        self.tell("chunk", strip=about)


def window_of(window: FrameWindow, nbytes: int, free: int) -> dict[str, Any]:
    """What is in a window, as JSON. nbytes: of the cache. free: bytes left on the device.

    sink: the first frames of the video that are kept. memory: other frames that are kept apart. kept: those behind them
    that are there for now, from the first up to the last + 1. writing: the frames of the open chunk.
    """
    end, total = window.end, window.end + window.open
    held = list(window.sink_frames()) if window.unlimited else list(window.kept[: window.kept_until(total)])
    sink = next((index for index, frame in enumerate(held) if frame != index), min(len(held), window.sink))
    behind = max(window.oldest, sink) if window.unlimited else max(window.oldest, total - window.ring)
    return {
        "limit": None if window.unlimited else window.capacity,
        "sink": sink,
        "memory": held[sink:],
        "kept": [min(behind, end), end],
        "writing": [end, total],
        "frames": total,
        "bytes": nbytes,
        "free": free,
    }
