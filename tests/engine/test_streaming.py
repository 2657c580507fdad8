"""A video on its way to disk: what is there while it grows, whatever ends it, and how it goes on."""

import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from test_growing import readable

from rolling_kv import streaming as streaming_module
from rolling_kv.config import CacheConfig
from rolling_kv.devices import Beside
from rolling_kv.growing import growing_place
from rolling_kv.pipeline import Interrupted, Pipeline
from rolling_kv.sampling.journal import Journal
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state_file import load_state, read_state
from rolling_kv.streaming import VideoStream, journal_place
from rolling_kv.tiny import make_tiny
from rolling_kv.vae.latents import to_raw
from rolling_kv.vae.wan import StreamingDecoder
from rolling_kv.video import read_frames, read_video_info

SIZE = dict(height=32, width=32)
PROMPT = "a red circle moving left"
ENGINE = Path(streaming_module.__file__).parents[1]
posix = pytest.mark.skipif(os.name == "nt", reason="signals and mounts of POSIX")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Pipeline.load(make_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """A video of ten chunks, made without a break."""
    return pipeline.generate(PROMPT, tmp_path_factory.mktemp("whole") / "a.mp4", seconds=7, seed=3, **SIZE)


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def seen_after(monkeypatch, number, look):
    """Have `look(stream)` called after that many chunks; what it raises ends the run."""
    add, counted = VideoStream.add, []

    def watched(self, state):
        kept = add(self, state)
        counted.append(kept.frames)
        if len(counted) == number:
            look(self)
        return kept

    monkeypatch.setattr(VideoStream, "add", watched)


def test_while_it_grows_the_video_plays_and_its_state_can_be_read(pipeline, whole, tmp_path, monkeypatch):
    def look(stream):
        assert [name for name in names(tmp_path) if name[0] != "."] == [
            "a.growing.mp4",
            "a.journal",
        ] and stream.video == growing_place(tmp_path / "a.mp4")
        assert read_state(journal_place(tmp_path / "a.mp4")).key == stream.state.key
        assert readable(stream.video) >= stream.state.pixel_frames - 4 * streaming_module.WAITING - 20
        looked.append(stream)

    looked = []
    seen_after(monkeypatch, 5, look)
    made = pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=7, seed=3, **SIZE)
    assert looked and made == tmp_path / "a.mp4" and names(tmp_path) == ["a.mp4"]
    assert made.read_bytes() == whole.read_bytes()


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt, which is a BaseException too."""


@pytest.mark.parametrize("error", [ValueError, Cancelled, SystemExit])
def test_whatever_ends_a_run_leaves_what_is_finished(error, pipeline, whole, tmp_path, monkeypatch, caplog):
    def end(_):
        raise error("enough")

    with monkeypatch.context() as patch, pytest.raises(error, match="enough"):
        seen_after(patch, 4, end)
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=7, seed=3, **SIZE)
    state = tmp_path / "a.state.safetensors"
    assert names(tmp_path) == ["a.mp4", state.name] and str(state) in caplog.text
    done = load_state(state, pipeline.model)
    assert torch.equal(read_frames(tmp_path / "a.mp4"), read_frames(whole)[: done.pixel_frames])
    assert read_state(state).texts == (PROMPT,)
    again = pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=5, seed=3, state_in=state, **SIZE)
    full = read_frames(whole)
    assert torch.equal(read_frames(again)[: len(full)], full)


@pytest.mark.parametrize("when", ["close", "finish", "save"])
def test_a_second_ctrl_c_leaves_the_journal_and_says_so(when, pipeline, tmp_path, monkeypatch):
    def again(*_, **__):
        raise KeyboardInterrupt

    def end(_):
        owner, name = {
            "close": (streaming_module._Worker, "close"),
            "finish": (streaming_module.GrowingVideo, "finish"),
            "save": (streaming_module, "save_state"),
        }[when]
        monkeypatch.setattr(owner, name, again)
        again()

    seen_after(monkeypatch, 3, end)
    with pytest.raises(Interrupted) as stopped:
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=7, seed=3, **SIZE)
    assert stopped.value.state == journal_place(tmp_path / "a.mp4") and stopped.value.video.exists()
    assert read_state(stopped.value.state).frames == 9


def test_nothing_is_left_where_no_chunk_was_made(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(RollingSession, "_tick", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=7, **SIZE)
    assert names(tmp_path) == []


def test_only_what_is_new(pipeline, whole, tmp_path):
    state = tmp_path / "a.safetensors"
    for seconds, options in ((5, dict(state_out=state)), (2, dict(state_in=state, new_only=True))):
        made = pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=seconds, seed=3, **SIZE, **options)
    before = read_state(state).pixel_frames
    with torch.inference_mode():
        pictures = pipeline.vae.decoder().decode(to_raw(load_state(state).latents().float()))
    assert read_video_info(made).frames == read_video_info(whole).frames - before
    assert before == pictures.shape[2]
    with pytest.raises(ValueError, match="where a state is continued"):
        pipeline.generate(PROMPT, tmp_path / "b.mp4", seconds=1, new_only=True, **SIZE)


def test_what_is_new_does_not_take_the_place_of_what_a_journal_alone_holds(pipeline, whole, tmp_path):
    session = RollingSession(pipeline.model, pipeline.text_encoder.encode([PROMPT]), **SIZE)
    session.prefill(torch.zeros(1, 16, 3, 4, 4))
    journal = journal_place(tmp_path / "a.mp4")
    with Journal(journal) as writer:
        writer.add(session.state)
    growing_place(tmp_path / "a.mp4").write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match="would be lost.*another name"):
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=1, state_in=journal, new_only=True, **SIZE)
    assert growing_place(tmp_path / "a.mp4").read_bytes() == whole.read_bytes()
    made = pipeline.generate(PROMPT, tmp_path / "b.mp4", seconds=1, state_in=journal, new_only=True, **SIZE)
    assert made.exists() and journal.exists()


def test_a_growing_video_is_not_extended_into_itself(pipeline, tmp_path):
    pipeline.generate(PROMPT, tmp_path / "b.mp4", seconds=1, **SIZE)
    left = (tmp_path / "b.mp4").rename(growing_place(tmp_path / "a.mp4"))
    data = left.read_bytes()
    with pytest.raises(ValueError, match="another name"):
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=1, video=left, **SIZE)
    assert left.read_bytes() == data


def test_the_frames_of_a_part_are_those_of_the_whole(pipeline, tmp_path):
    """The decoder needs no more of what comes before than `reach` says."""
    generator, written, shown = torch.Generator().manual_seed(0), [], []
    frames = pipeline.vae.reach + 9
    latents = torch.randn(1, 16, frames, 4, 4, generator=generator)
    with torch.inference_mode():
        expected = pipeline.vae.decoder().decode(to_raw(latents))
    session = RollingSession(pipeline.model, pipeline.text_encoder.encode([PROMPT]), **SIZE)
    session.prefill(latents[:, :, : frames - 3])
    before = session.state
    session.prefill(latents[:, :, frames - 3 :])
    settings = {"before": before, "new_only": True, "on_frames": lambda *given: shown.append(given)}
    stream = VideoStream(tmp_path / "a.mp4", pipeline.vae, 32, 32, **settings)
    stream._growing.write = written.append
    with stream:
        stream.add(session.state)
    assert [number for number, _ in shown] == [frames - 3, frames - 2, frames - 1]
    assert all(torch.equal(seen, put) for (_, seen), put in zip(shown, written))
    own = torch.cat(written)
    assert torch.equal(own, ((expected[0, :, -12:] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0))


def test_an_endless_video_ends_with_ctrl_c(pipeline, whole, tmp_path, monkeypatch):
    def end(_):
        raise KeyboardInterrupt

    seen_after(monkeypatch, 6, end)
    with pytest.raises(Interrupted) as stopped:
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=0, seed=3, **SIZE)
    assert stopped.value.left == 0 and stopped.value.video == tmp_path / "a.mp4"
    done = read_state(stopped.value.state)
    assert done.frames == 18 and torch.equal(read_frames(tmp_path / "a.mp4"), read_frames(whole)[: done.pixel_frames])
    with pytest.raises(ValueError, match="needs a window"):
        pipeline.generate(PROMPT, tmp_path / "b.mp4", seconds=0, cache=CacheConfig("all"), **SIZE)


def test_a_run_that_did_not_end_is_not_written_over(pipeline, tmp_path):
    journal_place(tmp_path / "a.mp4").write_bytes(b"of another run")
    with pytest.raises(FileExistsError, match=r"a run that did not end.*a\.growing\.mp4.*a\.journal"):
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=1, **SIZE)
    assert names(tmp_path) == ["a.journal"]


def test_beside_the_sampling_frames_are_decoded_in_a_thread_and_a_stream_of_their_own(
    pipeline, whole, tmp_path, monkeypatch
):
    """As on CUDA, with a stand-in for its stream: the frames and their order are the same."""
    decoding, places = [], []

    class Stream:
        @contextmanager
        def after_all(self):
            decoding.append("beside")
            yield
            decoding.pop()

    def watched(self, *args, step=StreamingDecoder._step, **options):
        places.append((threading.current_thread().name, list(decoding)))
        return step(self, *args, **options)

    monkeypatch.setattr(streaming_module, "beside", lambda device: Stream())
    monkeypatch.setattr(StreamingDecoder, "_step", watched)
    made = pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=7, seed=3, **SIZE)
    assert made.read_bytes() == whole.read_bytes()
    assert set(map(str, places)) == {str(("rolling_kv video", ["beside"]))}
    monkeypatch.setattr(StreamingDecoder, "_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.generate(PROMPT, tmp_path / "b.mp4", seconds=7, seed=3, **SIZE)
    assert names(tmp_path) == ["a.mp4", "b.state.safetensors"]  # no frame was decoded, and no chunk is lost


def test_two_runs_of_one_name_do_not_write_over_each_other(pipeline, whole, tmp_path, monkeypatch):
    def another(_):
        with pytest.raises(FileExistsError, match="a.growing.mp4 is being written by another run"):
            pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=1, **SIZE)
        tried.append(1)

    tried = []
    check = streaming_module.check_ended
    with monkeypatch.context() as patch:
        patch.setattr(streaming_module, "check_ended", lambda *args: check(tmp_path / "other.mp4", *args[1:]))
        add, counted = VideoStream.add, []

        def watched(self, state):
            counted.append(1)
            if len(counted) == 1:
                another(self)
            return add(self, state)

        patch.setattr(VideoStream, "add", watched)
        made = pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=7, seed=3, **SIZE)
    assert tried and made.read_bytes() == whole.read_bytes() and names(tmp_path) == ["a.mp4"]


def test_a_killed_run_that_is_continued_and_stopped_at_once_keeps_what_it_has_shown(pipeline, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    path, left = tmp_path / "a.mp4", journal_place(tmp_path / "a.mp4")
    state = tmp_path / "b.safetensors"
    pipeline.generate(PROMPT, tmp_path / "b.mp4", seconds=2, seed=3, state_out=state, **SIZE)
    with Journal(left) as journal:
        journal.add(load_state(state))
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(RollingSession, "_tick", stop)
        pipeline.generate(PROMPT, path, seconds=2, seed=3, state_in=left, **SIZE)
    assert stopped.value.state == left and stopped.value.video == growing_place(path)
    assert readable(growing_place(path)) == read_video_info(tmp_path / "b.mp4").frames
    assert load_state(left).key == load_state(state).key


@posix
def test_a_growing_video_follows_no_link_and_takes_no_other_video(pipeline, tmp_path):
    (tmp_path / "victim").write_text("of somebody else")
    growing_place(tmp_path / "a.mp4").symlink_to(tmp_path / "victim")
    pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=0.5, **SIZE)
    assert (tmp_path / "victim").read_text() == "of somebody else" and names(tmp_path) == ["a.mp4", "victim"]
    os.replace(tmp_path / "a.mp4", growing_place(tmp_path / "c.mp4"))
    with pytest.raises(FileExistsError, match="c.growing.mp4 would be written over, and it holds a video"):
        pipeline.generate(PROMPT, tmp_path / "c.mp4", seconds=0.5, **SIZE)


def test_an_error_of_the_thread_that_writes_ends_the_run(pipeline, tmp_path, monkeypatch):
    def broken(self, frames, write=streaming_module.GrowingVideo.write):
        if self.frames >= 21:
            raise OSError(28, "No space left on device")
        write(self, frames)

    monkeypatch.setattr(streaming_module.GrowingVideo, "write", broken)
    with pytest.raises(OSError, match="No space left on device"):
        pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=60, seed=3, **SIZE)
    assert read_video_info(tmp_path / "a.mp4").frames == 21
    assert read_state(tmp_path / "a.state.safetensors").frames < 60  # it did not go on for long


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="needs to mount a small disk")
@pytest.mark.parametrize("kilobytes", [160, 300])
def test_a_full_disk_keeps_what_is_finished(kilobytes, pipeline, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.decode()}")
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\..*: No space left on device|No space left on device"):
            pipeline.generate(PROMPT, disk / "a.mp4", seconds=600, seed=3, **SIZE)
        kept = next(path for path in disk.iterdir() if path.suffix in (".journal", ".safetensors"))
        done = load_state(kept, pipeline.model)
        assert done.frames > 6 and str(kept) in caplog.text
        assert names(disk) == sorted(["a.mp4", kept.name])
        assert len(read_frames(disk / "a.mp4")) >= done.pixel_frames - 40
        on_a_larger_one = pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=0.5, seed=3, state_in=kept, **SIZE)
        assert read_video_info(on_a_larger_one).frames == done.pixel_frames + 12
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


KILLED = """
    import os, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from rolling_kv.pipeline import Pipeline

    folder, rounds, longest = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    pipeline, chance = Pipeline.load(sys.argv[1]), random.Random(5)

    def run(path):
        pipeline.generate("a red circle moving left", path, height=16, width=16, seconds=4, seed=3)

    started = time.monotonic()
    run(folder / "warm.mp4")
    took = time.monotonic() - started
    for number in range(rounds):
        child = os.fork()
        if not child:
            run(folder / f"{number}.mp4")
            os._exit(0)
        time.sleep(took * chance.uniform(0.1, 0.95))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


@posix
def test_kill_9_at_random_points_leaves_what_plays_and_goes_on_exactly(pipeline, tmp_path):
    size = dict(height=16, width=16, seed=3)
    model = tmp_path / "model"
    make_tiny(model)
    videos = tmp_path / "videos"
    videos.mkdir()
    code = textwrap.dedent(KILLED)
    environment = os.environ | {"PYTHONPATH": str(ENGINE)}
    subprocess.run(
        [sys.executable, "-c", code, model, videos, "20", "1"], check=True, env=environment, capture_output=True
    )
    full, killed = read_frames(videos / "warm.mp4"), 0
    for number in range(20):
        path = videos / f"{number}.mp4"
        if not journal_place(path).exists():  # before the first chunk, or after the end
            assert path.exists() or readable(growing_place(path)) == 0
            continue
        killed += 1
        done = load_state(journal_place(path), pipeline.model)
        shown = readable(growing_place(path))
        assert done.pixel_frames - 4 * streaming_module.WAITING - 20 <= shown <= done.pixel_frames
        again = pipeline.generate(
            PROMPT, path, seconds=max(4 - done.seconds, 0.1), state_in=journal_place(path), **size
        )
        assert torch.equal(read_frames(again)[: len(full)], full)
        assert not journal_place(path).exists() and not growing_place(path).exists()
    assert killed >= 12


def test_memory_does_not_grow_with_the_video(pipeline, tmp_path, monkeypatch):
    sizes, add = [], VideoStream.add

    def watched(self, state):
        kept = add(self, state)
        sizes.append(psutil.Process().memory_info().rss)
        return kept

    monkeypatch.setattr(VideoStream, "add", watched)
    pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=80, height=16, width=16)
    assert len(sizes) == 107 and max(sizes[30:]) < 1.05 * sizes[30], [size // 2**20 for size in sizes[::10]]


class RecordedStream:
    """A stand-in of a CUDA stream that notes what is done in it and what it waits for. now: the streams of each thread, the latest last."""

    now = threading.local()

    def __init__(self, name, log):
        self.name, self.log, self.device = name, log, torch.device("cuda", 0)

    def record_event(self):
        event = object()
        self.log.append((self.name, "reached", event))
        return event

    def wait_event(self, event):
        self.log.append((self.name, "waits", event))

    def __enter__(self):
        self.now.__dict__.setdefault("inside", []).append(self)

    def __exit__(self, *_):
        self.now.inside.pop()


def test_beside_the_sampling_chunks_are_decoded_in_turn_each_after_all_that_came_before_it(
    pipeline, whole, tmp_path, monkeypatch
):
    log: list[tuple] = []
    main = RecordedStream("sampling", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: RecordedStream("decoding", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(streaming_module, "beside", lambda device: Beside(torch.device("cuda", 0)))
    decode_frames, add = StreamingDecoder.decode_frames, VideoStream.add

    def decoded(self, latents):
        (stream,) = RecordedStream.now.inside
        stream.log.append((stream.name, "decodes", latents.device.type, threading.current_thread() is main_thread))
        yield from decode_frames(self, latents)
        assert RecordedStream.now.inside == [stream], "all of a chunk is decoded in the stream"

    def added(self, state):
        main.log.append(("sampling", "makes", len(state.chunks)))
        return add(self, state)

    main_thread = threading.current_thread()
    monkeypatch.setattr(StreamingDecoder, "decode_frames", decoded)
    monkeypatch.setattr(VideoStream, "add", added)
    made = pipeline.generate(PROMPT, tmp_path / "a.mp4", seconds=7, seed=3, **SIZE)
    assert made.read_bytes() == whole.read_bytes()
    marks = [entry for entry in log if entry[1] == "reached"]
    turns = [entry for entry in log if entry[0] == "decoding"]
    assert len(marks) == 10 and {mark[0] for mark in marks} == {"sampling"}
    expected = [
        turn for mark in marks for turn in (("decoding", "waits", mark[2]), ("decoding", "decodes", "cpu", False))
    ]
    assert turns == expected
    for number, mark in enumerate(marks, 1):  # the chunk is there when its mark is set, and decoded after it
        at = log.index(mark)
        assert log.index(("sampling", "makes", number)) < at < log.index(("decoding", "waits", mark[2]))
