"""Stream Video: the video of Sample Video in a file that grows; what is left when it is cancelled or killed goes on."""

import json
import os
import re
import shutil
import threading
import time

import av
import pytest
from graphs import chosen, loaders, node, one_sampler, prompt, read_video, sample
from servers import start
from test_state_files import load, saved, schedule

from rolling_kv.growing import whole_length
from rolling_kv.sampling.state_file import load_state, read_state
from tools.comfyui.client import PromptFailed, PromptInterrupted, PromptRejected, first_file

RED, BLUE = "a red circle moving right", "a blue circle moving left"
SECONDS = {1: 0.5625, 2: 1.3125, 4: 2.8125, 6: 4.3125}
"""Seconds of so many chunks."""


def stream(seconds: float, prefix: str, positive: str = "positive", **inputs) -> dict:
    values = {"model": ["model", 0], "positive": [positive, 0], "vae": ["vae", 0], "seconds": seconds, "seed": 1}
    values |= {"width": 64, "height": 64, "filename_prefix": prefix}
    return node("RollingKVStreamVideo", **{**values, **inputs})


def streamed(seconds: float, prefix: str, **inputs) -> dict:
    """A whole prompt, whose state is put away as well."""
    graph = loaders() | {"positive": prompt(RED), "stream": stream(seconds, prefix, **inputs)}
    return graph | {"put away": node("RollingKVSaveState", state=["stream", 1], filename_prefix=f"{prefix} state")}


def sampled(chunks: int) -> dict:
    """The same video by Sample Video, Decode Video and Save Video."""
    graph = one_sampler(chunks) | {
        "put away": node("RollingKVSaveState", state=["sample", 1], filename_prefix="sampled/state")
    }
    graph["video"] = node("RollingKVDecodeVideo", vae=["vae", 0], latent=["sample", 0])
    graph["save"] = node("SaveVideo", video=["video", 0], filename_prefix="sampled/video", format="auto", codec="auto")
    return graph


def key(path) -> str:
    return read_state(path).key


def frames(data: bytes):
    return read_video(data).frames


class Cancel:
    """For `run`: interrupts after so many chunks, of which the node tells."""

    def __init__(self, client, chunks: int):
        self.client, self.left, self.said = client, chunks, []

    def __call__(self, node_id: str, text: str) -> None:
        self.said.append(text)
        self.left -= node_id == "stream"
        if not self.left:
            self.client.interrupt()


def beside(server, folder: str) -> list[str]:
    return sorted(os.listdir(server.folder / "output" / folder))


def test_the_file_is_that_of_sample_video_and_nothing_else_stays(server, client):
    outputs = client.run(streamed(2.8, "whole/video"))
    assert beside(server, "whole") == ["video state_00001_.safetensors", "video_00001_.mp4"]
    data = client.view(first_file({"stream": outputs["stream"]}, ".mp4"))
    other = client.run(sampled(4))
    assert key(saved(server, outputs)) == key(saved(server, other))
    assert read_state(saved(server, outputs)).texts == (RED,)
    assert (frames(data) == frames(client.view(first_file({"save": other["save"]}, ".mp4")))).all()
    with av.open(str(server.folder / "output/whole/video_00001_.mp4")) as container:
        assert json.loads(container.metadata["prompt"])["stream"]["class_type"] == "RollingKVStreamVideo"


def test_a_stream_feeds_other_nodes_and_takes_schedules_sizes_rates_and_encoders(server, client):
    graph = streamed(
        1.3, "fed/video", enlarge=2, positive="words", encoder="hevc_nvenc", **chosen("fps", "this many", rate=8.0)
    )
    graph["words"] = schedule(f"0: {RED}\n0.5: {BLUE} [cut]")
    graph["again"] = node("SaveVideo", video=["stream", 0], filename_prefix="fed/again", format="auto", codec="auto")
    graph["more"] = stream(0.7, "fed/more", state=["stream", 1], written="only what is new")
    outputs = client.run(graph)
    video, copy = (read_video(client.view(first_file({name: outputs[name]}, ".mp4"))) for name in ("stream", "again"))
    assert video.frames.shape == (21, 128, 128, 3) and video.rate == 8 and (video.frames == copy.frames).all()
    assert len(read_video(client.view(first_file({"more": outputs["more"]}, ".mp4"))).frames) == 12
    records = read_state(saved(server, outputs)).records
    assert [record.switch for record in records] == ["", "cut"]
    assert "the encoder hevc_nvenc does not open here" in server.log, "128 pixels are too few for any GPU's"


@pytest.mark.parametrize(
    ("every_server", "chunks"),
    [("default", 1), ("default", 3), ("classic", 1), ("lru", 3), ("cacheless", 3)],
    indirect=["every_server"],
)
def test_a_cancelled_stream_keeps_its_video_and_goes_on_from_its_state(every_server, chunks):
    client, folder = every_server.client, f"cancelled {chunks}"
    cancel = Cancel(client, chunks)
    with pytest.raises(PromptInterrupted, match="RollingKVStreamVideo"):
        client.run(streamed(0.0, f"{folder}/video"), on_text=cancel)
    names = ["video_00001_.mp4", "video_00001_.state.safetensors"]
    assert beside(every_server, folder) == names
    for told in (cancel.said[-1], every_server.log):
        assert all(str(every_server.folder / "output" / folder / name) in told for name in names)
    done = read_state(every_server.folder / "output" / folder / names[1])
    video = (every_server.folder / "output" / folder / names[0]).read_bytes()
    assert chunks <= len(done.records) <= 5 and len(frames(video)) == done.pixel_frames
    client.free()
    left = SECONDS[6] - done.seconds - 0.01
    graph = streamed(left, f"{folder}/going on", state=["load", 0])
    graph["load"] = load(f"{folder}/{names[1]} [output]", model=["model", 0])
    outputs, whole = client.run(graph), client.run(sampled(6))
    assert key(saved(every_server, outputs)) == key(saved(every_server, whole))
    continued = frames(client.view(first_file({"stream": outputs["stream"]}, ".mp4")))
    assert (continued == frames(client.view(first_file({"save": whole["save"]}, ".mp4")))).all()


def test_what_a_killed_server_leaves_plays_and_another_server_goes_on_from_its_journal(install, server, client):
    with start(install) as killed:
        folder = killed.folder / "output/killed"
        running = threading.Thread(target=_run_until_killed, args=(killed.client, streamed(0.0, "killed/video")))
        running.start()
        growing, journal = folder / "video_00001_.growing.mp4", folder / "video_00001_.journal"
        deadline = time.monotonic() + 300
        while not growing.exists() or not whole_length(growing):  # the encoder holds some back
            assert running.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
        killed.process.kill()
        running.join()
        names = sorted(os.listdir(folder))
        assert names[-2:] == [growing.name, journal.name]
        for mark in names[:-2]:  # of the claim to the name, which the next run of that name removes
            assert mark.startswith(f".{growing.name}.") and (folder / mark).stat().st_size == 0
        assert len(frames(growing.read_bytes())) > 0
        shutil.copy(journal, server.folder / "input/left behind.journal")
    info = client.object_info("RollingKVLoadState")["RollingKVLoadState"]
    assert "left behind.journal" in info["input"]["required"]["state_name"][1]["options"]
    done = load_state(server.folder / "input/left behind.journal")
    count = len(done.records) + 2
    graph = streamed(1.4, "from journal/video", state=["load", 0])
    graph["load"] = load("left behind.journal", model=["model", 0])
    outputs, whole = client.run(graph), client.run(sampled(count))
    assert key(saved(server, outputs)) == key(saved(server, whole))


def _run_until_killed(client, graph: dict) -> None:
    with pytest.raises(Exception):  # noqa: B017 - whatever comes of a connection that breaks
        client.run(graph)


@pytest.mark.traceback_expected
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename_prefix": "../evil"}, "filename_prefix cannot be"),
        ({"seconds": 0.0, "model": ["all", 0]}, "a window"),
        ({"state": ["two", 1]}, "one video, and these are 2"),
        ({"vae": ["model", 0]}, "vae"),
        ({"seconds": -1.0}, "seconds"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(server, client, change, message):
    graph = streamed(**{"seconds": 1.0, "prefix": "refused/video", **change})
    graph["all"] = node(
        "RollingKVAttachCache",
        model=["model", 0],
        **chosen("window", "all frames"),
        **chosen("sink", "the model's own"),
    )
    graph["first"] = sample(1)
    graph["twice"] = node("RepeatLatentBatch", samples=["first", 0], amount=2)
    graph["two"] = sample(1, initial_latent=["twice", 0])
    with pytest.raises((PromptFailed, PromptRejected), match=re.escape(message)):
        client.run(graph)
    assert not (server.folder / "output/refused").exists() or beside(server, "refused") == []
