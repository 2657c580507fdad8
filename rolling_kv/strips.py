"""The pictures of a chunk side by side in one WebP file, made in a thread that drops what it has no time for."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from typing import NamedTuple

import torch
from PIL import Image

logger = logging.getLogger(__name__)

WAITING = 2
"""Chunks that may wait for the thread; of more, the oldest is dropped."""
QUALITY = 70
ROW = 4096
"""Most pixels of a row of frames: what every browser can draw from."""


class Strip(NamedTuple):
    """The frames of a chunk in one picture, row by row.

    data: a WebP file. frames: how many; seconds: of the video that they show. width, height: of one frame, in pixels. columns: frames in a row.
    newest: the last frame; None where only the file is kept.
    """

    data: bytes
    frames: int
    seconds: float
    width: int
    height: int
    columns: int
    newest: Image.Image | None


def make_strip(frames: torch.Tensor, seconds: float, size: int) -> Strip:
    """frames: uint8 [T, H, W, 3], of so many seconds of video. size: most pixels along the longer side of a frame; smaller ones stay as they are."""
    count, height, width = frames.shape[:3]
    scale = min(1.0, size / max(height, width))
    # Even, so that no two frames share a sample of colour.
    width, height = (max(round(side * scale / 2) * 2, 2) for side in (width, height))
    columns = min(count, max(ROW // width, 1))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for number, frame in enumerate(frames.numpy()):
        picture = Image.fromarray(frame)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        sheet.paste(picture, (number % columns * width, number // columns * height))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=QUALITY, method=0)
    return Strip(file.getvalue(), count, seconds, width, height, columns, picture)


Making = Callable[[], Strip]


class StripThread:
    """Makes strips one after the other, beside whoever asks for them, who never waits.

    tell: called in the thread as tell(chunk, strip) for every chunk in its order; None for a strip that was dropped, or
        could not be made.
    """

    def __init__(self, tell: Callable[[int, Strip | None], None]):
        self._tell = tell
        self._waiting: deque[tuple[int, Making | None]] = deque()
        self._changed = Condition()
        self._making = self._closed = False
        self._failed = False
        self._thread = Thread(target=self._run, name="rolling_kv preview", daemon=True)
        self._thread.start()

    def put(self, chunk: int, make: Making | None) -> None:
        """Have a strip made; None for a chunk that is to have none."""
        with self._changed:
            self._waiting.append((chunk, make))
            busy = [index for index, (_, make) in enumerate(self._waiting) if make is not None]
            if len(busy) > WAITING:
                self._drop(busy[0])
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until nothing waits and nothing is being made."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._making)

    def close(self, finish: bool = True) -> None:
        """Wait until the thread has ended. finish: make what still waits; otherwise it is dropped."""
        with self._changed:
            if not finish:
                for index in range(len(self._waiting)):
                    self._drop(index)
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _drop(self, index: int) -> None:
        self._waiting[index] = self._waiting[index][0], None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                (chunk, make), self._making = self._waiting.popleft(), True
            strip = None if make is None else self._made(make)
            del make  # and the frames in it
            self._tell(chunk, strip)
            with self._changed:
                self._making = False
                self._changed.notify_all()

    def _made(self, make: Making) -> Strip | None:
        """A preview that fails is not worth a run: it is told once, and left out."""
        try:
            with torch.inference_mode():
                return make()
        except Exception as error:
            if not self._failed:
                logger.warning("the preview cannot be made: %s", error)
            self._failed = True
            return None
