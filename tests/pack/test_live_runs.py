"""What pages are told of runs, and the strips of pictures, where no server is needed to see it."""

import gc
import io
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from node_modules import node_module
from PIL import Image

from rolling_kv.cache.window import FrameWindow
from rolling_kv.geometry import WAN_21
from rolling_kv.sampling.steering import Steering


@pytest.fixture(scope="module")
def live():
    with node_module("live.runs") as runs:
        yield SimpleNamespace(runs=runs, strips=sys.modules["pack.rolling_kv.strips"])


@pytest.fixture(autouse=True)
def patient(live, monkeypatch):
    """The thread drops nothing, however slowly it starts."""
    monkeypatch.setattr(live.strips, "WAITING", 99)


class Told(list):
    """Keeps what pages are told: (event, data)."""

    def __call__(self, event, data):
        self.append((event, data))

    def of(self, event):
        return [data for name, data in self if name == f"rolling_kv.{event}"]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def runs(live, told):
    return live.runs.Runs(told)


def a_run(live, runs, **settings):
    given = {"prompt_id": "p", "node": "12:7:5", "display_node": "12", "geometry": WAN_21, "fps": 16, "size": (64, 64)}
    given["steered"] = SimpleNamespace(steering=Steering(refusal="nothing can be said here"))
    return live.runs.Run(runs, **{**given, "start": 0, "end": 9, "chunks": 3, **settings})


class Session:
    """Stands where a session is after so many latent frames of chunks of three."""

    cache_bytes = (100, 20)

    def __init__(self, frames: int):
        self.window = FrameWindow(9, sink=1)
        for _ in range(frames // 3 - 1):
            self.window.begin(3)
            self.window.commit()
        self.window.begin(3)
        self.state = SimpleNamespace(frames=frames, frames_between=lambda first, last: (first, last))


def grey(level: int, frames: int = 3) -> torch.Tensor:
    return torch.full((frames, 16, 16, 3), level, dtype=torch.uint8)


class Preview:
    """Makes grey pictures of the latent frames' numbers. waits: for this before each."""

    def __init__(self, waits: threading.Event | None = None, fails: tuple[int, ...] = ()):
        self.waits, self.fails, self.asked = waits, fails, []

    def pictures(self, between, first, last):
        assert between(first, last) == (first, last)
        if self.waits is not None:
            assert self.waits.wait(60)
        self.asked.append(first)
        if first in self.fails:
            raise ValueError("no memory is left")
        return torch.cat([grey(8 * number, 1) for number in range(first, last)])


def opened(strip) -> np.ndarray:
    """The frames [T, H, W, 3] of a strip."""
    sheet = np.asarray(Image.open(io.BytesIO(strip.data)).convert("RGB"))
    places = [
        (number // strip.columns * strip.height, number % strip.columns * strip.width) for number in range(strip.frames)
    ]
    return np.stack([sheet[top : top + strip.height, left : left + strip.width] for top, left in places])


def test_a_strip_holds_the_frames_in_their_order(live):
    frames = torch.stack([torch.full((64, 128, 3), 20 * number, dtype=torch.uint8) for number in range(12)])
    strip = live.strips.make_strip(frames, 0.75, 32)
    assert (strip.frames, strip.seconds, strip.width, strip.height, strip.columns) == (12, 0.75, 32, 16, 12)
    assert abs(opened(strip).astype(int).mean((1, 2, 3)) - 20 * np.arange(12)).max() < 3
    assert strip.newest.getpixel((0, 0)) == (220, 220, 220)


def test_a_strip_of_many_frames_has_rows_and_small_frames_stay_as_they_are(live):
    frames = torch.randint(0, 256, (9, 8, 1024, 3), dtype=torch.uint8)
    strip = live.strips.make_strip(frames, 1, 1024)
    assert (strip.width, strip.height, strip.columns) == (1024, 8, 4)
    with Image.open(io.BytesIO(strip.data)) as sheet:
        assert sheet.format == "WEBP" and sheet.size == (4096, 24)
    assert live.strips.make_strip(frames[:, :, :5], 1, 1024)[3:6] == (4, 8, 9)  # even, or colours would run


def test_every_chunk_is_told_in_its_order_with_its_strip_and_the_run_before_and_after(live, runs, told):
    with a_run(live, runs, preview=Preview(), free=lambda: 7) as run:
        for frames in (3, 6, 9):
            run.show(Session(frames))
    assert [event for event, _ in told] == ["rolling_kv.run", *["rolling_kv.chunk"] * 3, "rolling_kv.run"]
    begun, ended = told.of("run")
    assert begun["status"] == "running" and begun["chunk"] == 0 and begun["left"] is None and begun["window"] is None
    assert ended["status"] == "ended" and ended["chunk"] == ended["chunks"] == 3 and ended["left"] == 0
    assert ended["frames"] == 33 and ended["seconds"] == 33 / 16 and ended["node"] == "12:7:5" and "strips" not in ended
    assert ended["window"] == {
        "limit": 9, "sink": 1, "memory": [], "kept": [1, 6], "writing": [6, 9], "frames": 9, "bytes": 120, "free": 7,
    }  # fmt: skip
    strips = [event["strip"] for event in told.of("chunk")]
    assert [strip["chunk"] for strip in strips] == [1, 2, 3]
    assert [strip["seconds"] for strip in strips] == [9 / 16, 12 / 16, 12 / 16]
    assert strips[0]["url"] == f"/rolling_kv/runs/{run.id}/chunks/1.webp" and strips[0]["frames"] == 3
    assert runs.listed() == [{**ended, "strips": strips}]
    levels = [opened(runs.strip(run.id, number)).mean((1, 2, 3)).round() for number in (1, 2, 3)]
    assert abs(np.concatenate(levels) - 8 * np.arange(9)).max() < 3
    assert runs.strip(run.id, 4) is None and runs.strip("0" * 16, 1) is None and runs.get("0" * 16) is None


def test_what_a_run_goes_on_with_is_told_in_seconds_of_the_whole_video(live, runs, told):
    with a_run(live, runs, start=6, end=12, chunks=2, fps=8, preview=Preview()) as run:
        run.show(Session(9))
        about = run.about()
    assert about["first_seconds"] == 21 / 8 and about["frames"] == 12 and about["seconds"] == 1.5
    assert about["left"] == pytest.approx(12 / about["rate"])
    assert [strip["seconds"] for strip in runs.listed()[0]["strips"]] == [1.5]


def test_an_endless_run_has_no_end(live, runs):
    with a_run(live, runs, end=None, chunks=None, preview=Preview()) as run:
        run.show(Session(3))
        assert run.about()["left"] is None and run.about()["chunks"] is None and run.about()["rate"] > 0


@pytest.mark.parametrize("order", ["frames first", "chunks first"])
def test_frames_of_the_video_itself_make_the_strips_whichever_comes_first(live, runs, told, order):
    """A continued video: the frames before this run are not shown."""
    with a_run(live, runs, start=3) as run:
        shows = [lambda frames=frames: run.show(Session(frames)) for frames in (6, 9)]
        sees = [lambda number=number: run.see(number, grey(10 * number, 4)) for number in range(9)]
        for step in [*sees, *shows] if order == "frames first" else [*shows, *sees]:
            step()
    assert [event["strip"]["frames"] for event in told.of("chunk")] == [12, 12]
    levels = np.concatenate([opened(runs.strip(run.id, number)).mean((1, 2, 3)) for number in (1, 2)])
    assert abs(levels - np.repeat(10 * np.arange(3, 9), 4)).max() < 3


def test_a_chunk_whose_frames_never_come_is_told_all_the_same(live, runs, told):
    with a_run(live, runs) as run:
        run.see(0, grey(0))
        run.show(Session(3))
    assert [event["strip"] for event in told.of("chunk")] == [None]


def test_whoever_samples_never_waits_and_what_there_is_no_time_for_is_dropped(live, runs, told, monkeypatch):
    """The oldest that wait are dropped; all chunks are told of in their order."""
    monkeypatch.setattr(live.strips, "WAITING", 2)
    may = threading.Event()
    with a_run(live, runs, end=30, chunks=10, preview=(preview := Preview(may))) as run:
        for frames in range(3, 33, 3):
            run.show(Session(frames))
        assert run.chunk == 10 and not told.of("chunk")
        may.set()
    made = [event["strip"]["chunk"] for event in told.of("chunk") if event["strip"]]
    assert len(told.of("chunk")) == 10 and made[-2:] == [9, 10] and len(made) <= 3
    assert [3 * (number - 1) for number in made] == preview.asked
    places = [index + 1 for index, event in enumerate(told.of("chunk")) if event["strip"]]
    assert places == made


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "failed"), (KeyboardInterrupt(), "cancelled")])
def test_a_run_that_breaks_off_says_so_and_decodes_no_more(live, runs, told, error, status):
    may = threading.Event()
    preview = Preview(may)
    with pytest.raises(type(error)), a_run(live, runs, preview=preview) as run:
        for frames in (3, 6, 9):
            run.show(Session(frames))
        threading.Timer(0.2, may.set).start()
        raise error
    assert told[-1][1]["status"] == status and len(told.of("chunk")) == 3 and len(preview.asked) <= 1
    assert [known["status"] for known in runs.listed()] == [status]


def test_a_run_that_has_ended_lets_its_decoder_go(live, runs):
    preview = Preview()
    gone = weakref.ref(preview)
    with a_run(live, runs, preview=preview) as run:
        run.show(Session(3))
    del preview
    gc.collect()
    assert gone() is None and runs.get(run.id) is run and run.about()["status"] == "ended"


def test_a_preview_that_fails_harms_nobody_and_is_logged_once(live, runs, told, caplog):
    with a_run(live, runs, preview=Preview(fails=(0, 3))) as run:
        for frames in (3, 6, 9):
            run.show(Session(frames))
    assert [event["strip"] is None for event in told.of("chunk")] == [True, True, False]
    assert [record.getMessage() for record in caplog.records] == ["the preview cannot be made: no memory is left"]


def test_without_previews_chunks_are_told_of_and_no_picture_is_made(live, runs, told):
    runs.settings = live.runs.PreviewSettings(on=False)
    with a_run(live, runs, preview=(preview := Preview())) as run, a_run(live, runs) as other:
        run.show(Session(3))
        other.see(2, grey(1))
        other.show(Session(3))
    assert [event["strip"] for event in told.of("chunk")] == [None, None] and preview.asked == []
    assert run.newest() is None


def test_the_newest_frame_is_given_once_and_as_large_as_the_settings_say(live, runs):
    runs.settings = live.runs.PreviewSettings(size=96)
    with a_run(live, runs, preview=Preview()) as run:
        run.show(Session(3))
        run._thread.close()
        kind, picture, size = run.newest()
        assert (kind, picture.size, size) == ("JPEG", (16, 16), 96) and picture.getpixel((3, 3)) == (16, 16, 16)
        assert run.newest() is None


def test_a_pause_is_told_of_and_is_no_work(live, runs, told, monkeypatch):
    clock = iter([0, 10, 110, 120, *range(200, 300)])
    monkeypatch.setattr(live.runs.time, "monotonic", lambda: next(clock))
    with a_run(live, runs, preview=Preview()) as run:
        run.steer("pause")
        with run._steering.idle():
            assert runs.listed()[0]["status"] == "paused" and runs.listed()[0]["waiting"] and not run.has_ended
        run.steer("resume")
        run.show(Session(3))
        assert run.about()["rate"] == 9 / 20
    assert [event["status"] for event in told.of("run")] == ["running", *["paused"] * 3, "running", "ended"]


def test_the_end_is_what_is_told_last_whoever_steers_meanwhile(live, runs, told, monkeypatch):
    """A page asks for a pause, and while that is being told the run ends: it was told to be paused for good."""
    spoken, ended, about = threading.Event(), threading.Event(), live.runs.Run.about
    sampling = threading.current_thread()

    def slowly(run):
        known = about(run)
        if threading.current_thread() is not sampling:
            spoken.set()
            ended.wait(0.5)
        return known

    monkeypatch.setattr(live.runs.Run, "about", slowly)
    with a_run(live, runs, preview=Preview()) as run:
        page = threading.Thread(target=run.steer, args=["pause"])
        page.start()
        assert spoken.wait(60)
    ended.set()
    page.join()
    assert [event["status"] for event in told.of("run")] == ["running", "paused", "ended"]


def test_a_run_that_ends_while_it_is_steered_is_told_of_no_more(live, runs, told):
    """The next run of its node has begun by then, whose place it would take on every page."""
    steered = SimpleNamespace(
        steering=Steering(refusal="no prompt is known here"), say=lambda *_: run.__exit__(None, None, None)
    )
    run = a_run(live, runs, steered=steered, preview=Preview()).__enter__()
    with pytest.raises(LookupError):
        run.steer("prompt", "a blue circle")
    assert [event["status"] for event in told.of("run")] == ["running", "ended"]


def test_memory_is_bounded_the_oldest_strips_and_runs_go_first(live, runs, told, monkeypatch):
    made = []
    for _ in range(7):
        with a_run(live, runs, preview=Preview()) as run:
            run.show(Session(3))
            run.show(Session(6))
        made.append(run.id)
    with a_run(live, runs, preview=Preview()) as run:
        listed = [known["run"] for known in runs.listed()]
        assert listed == [*made[-live.runs.ENDED :], run.id]
        assert runs.get(made[0]) is None and runs.strip(made[0], 1) is None and runs.strip(made[-1], 1) is not None
        assert runs.strip(made[-1], 1).newest is None  # would not be counted
        monkeypatch.setattr(live.runs, "STRIP_BYTES", 2 * len(runs.strip(made[-1], 1).data) + 10)
        run.show(Session(3))
    assert [len(known["strips"]) for known in runs.listed()] == [0] * (live.runs.ENDED - 1) + [1, 1]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (FrameWindow(9, sink=3), {"limit": 9, "sink": 3, "memory": [], "kept": [6, 12], "writing": [12, 12]}),
        (FrameWindow(5, sink=0, memory=1), {"sink": 0, "memory": [0], "kept": [8, 12], "writing": [12, 12]}),
        (FrameWindow(99, sink=1, unlimited=True), {"limit": None, "sink": 1, "memory": [], "kept": [1, 12]}),
    ],
)
def test_the_window_is_told_as_it_is(live, window, expected):
    for _ in range(4):
        window.begin(3)
        window.commit()
    about = live.runs.window_of(window, 1, 2)
    assert {name: about[name] for name in expected} == expected


def test_a_window_after_a_flush_keeps_frames_apart(live):
    window = FrameWindow(9, sink=3)
    for _ in range(4):
        window.begin(3)
        window.commit()
    window.flush()
    window.begin(3)
    about = live.runs.window_of(window, 1, 2)
    assert (about["sink"], about["memory"], about["kept"], about["writing"]) == (1, [10, 11], [12, 12], [12, 15])
