"""The live preview on a real server: what pages are told while a run goes on, and the pictures that they get."""

import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from graphs import (
    loaders,
    node,
    one_sampler,
    prompt,
    read_video,
    sample,
    save_images,
    save_latent,
    saved_images,
    saved_latent,
)
from safetensors.torch import save_file
from test_stream_video import streamed
from watching import Page, listed

from rolling_kv.bundled import BUNDLED
from rolling_kv.vae.taehv import Taehv

ENDED = "execution_success"
CLOSE = 4
"""Mean difference, of 255, that WebP and the video file make."""


@pytest.fixture
def page(server):
    with Page(server.client) as page:
        yield page


@pytest.fixture
def preview(client):
    """Sets the pages' settings, and puts them back."""
    yield lambda **settings: json.loads(client.post("/api/rolling_kv/preview", settings))
    client.post("/api/rolling_kv/preview", {})


def apart(frames, others) -> float:
    assert frames.shape == others.shape
    return abs(frames.astype(int) - others.astype(int)).mean()


def with_images(graph: dict) -> dict:
    """Saves the frames of the node "sample" as well."""
    decode = node("RollingKVDecodeImages", vae=["vae", 0], latent=["sample", 0])
    return graph | {"images": decode, "frames": save_images("images")}


def with_vae(chunks: int) -> dict:
    return with_images(one_sampler(chunks, vae=["vae", 0]))


def result(page, graph: dict) -> dict:
    """The outputs of a prompt that ends well."""
    assert page.run(graph) == ENDED
    history = json.loads(page.client.get("/history?max_items=1"))
    return next(iter(history.values()))["outputs"]


def test_stream_video_shows_the_frames_of_its_file_chunk_by_chunk(server, page):
    server.client.free()
    during = []

    def reload(name, data):
        if name == "rolling_kv.chunk":
            during.append(listed(server.client)[data["run"]])

    assert page.run(streamed(2.8, "shown/video"), reload) == ENDED
    events = page.chunks("stream")
    assert [event["strip"]["chunk"] for event in events] == [1, 2, 3, 4]
    assert [event["strip"]["frames"] for event in events] == [9, 12, 12, 12]
    assert page.statuses("stream") == ["running", "ended"]
    assert all(event["chunks"] == 4 and event["fps"] == 16 and event["size"] == [64, 64] for event in events)
    assert events[0]["first_seconds"] == 0 and events[-1]["seconds"] == 2.8125 and events[-1]["left"] == 0
    assert events[1]["left"] > 0 and events[1]["rate"] > 0
    video = read_video((server.folder / "output/shown/video_00001_.mp4").read_bytes()).frames
    assert apart(page.shown("stream"), video) < CLOSE
    for late, event in zip(during, events):  # a page that was reloaded then
        strips = [strip["chunk"] for strip in late["strips"]]
        assert strips[: event["strip"]["chunk"]] == list(range(1, event["strip"]["chunk"] + 1))
    now = listed(server.client)[events[0]["run"]]
    assert now["status"] == "ended" and now["strips"] == [event["strip"] for event in events]
    assert events[-1]["window"] | {"free": 0} == {
        "limit": 9, "sink": 0, "memory": [], "kept": [3, 9], "writing": [9, 12], "frames": 12, "bytes": 737280, "free": 0,
    }  # fmt: skip
    assert events[-1]["window"]["free"] > 2**20


def test_sample_video_shows_a_picture_for_each_latent_frame_without_a_vae_and_the_video_with_one(server, page):
    outputs = result(page, with_images(one_sampler(2)))
    frames = saved_images(page.client, outputs, "frames")
    shown = page.shown("sample")
    each = np.stack([frames[0], *(frames[first : first + 4].mean(0) for first in range(1, 21, 4))])
    assert apart(shown, each) < 8 < apart(shown, np.roll(each, 16, axis=2))
    assert [event["strip"]["seconds"] for event in page.chunks("sample")] == [9 / 16, 12 / 16]
    page.events.clear()
    server.client.free()
    outputs = result(page, with_vae(2))
    assert apart(page.shown("sample"), saved_images(page.client, outputs, "frames")) < CLOSE


def test_the_preview_does_not_change_what_is_made(server, page, preview):
    latents = []
    for settings in ({"on": True}, {"on": False}):
        preview(**settings)
        server.client.free()
        latents.append(saved_latent(page.client, result(page, one_sampler(2, vae=["vae", 0]))))
    assert torch.equal(*latents)


def test_a_continued_video_shows_what_is_new(server, page):
    graph = one_sampler(1) | {"second": sample(2, state=["sample", 1]), "save": save_latent("second")}
    graph["images"] = node("RollingKVDecodeImages", vae=["vae", 0], latent=["second", 0])
    graph["frames"] = save_images("images")
    graph["second"]["inputs"]["vae"] = ["vae", 0]
    frames = saved_images(page.client, result(page, graph), "frames")
    events = page.chunks("second")
    assert events[0]["first_seconds"] == 9 / 16 and events[-1]["frames"] == 24
    assert apart(page.shown("second"), frames[9:]) < CLOSE


def test_two_samplers_of_one_graph_and_those_in_subgraphs_are_told_apart_to_every_page(server, page):
    graph = loaders() | {
        "positive": prompt("a red circle moving right"),
        "12:7:5": sample(1, seed=5),
        "8": sample(2, seed=6),
    }
    graph |= {"one": save_latent("12:7:5"), "two": save_latent("8")}
    with Page(server.client) as other:
        assert page.run(graph) == ENDED
        other.follow(None), other.follow(None)
        assert other.events == page.events
    assert [len(page.chunks(name)) for name in ("12:7:5", "8")] == [1, 2]
    runs = {data["run"]: (data["node"], data["display_node"], data["prompt_id"]) for _, data in page.events}
    assert len(runs) == 2 and {names[:2] for names in runs.values()} == {("12:7:5", "12:7:5"), ("8", "8")}
    assert len({names[2] for names in runs.values()}) == 1
    assert listed(server.client).keys() >= runs.keys()


def test_a_cancelled_run_says_so_and_shows_what_it_has_made(server, page):
    def cancel(name, data):
        if data["chunk"] == 2:
            server.client.interrupt()

    assert page.run(streamed(0.0, "given up/video"), cancel) == "execution_interrupted"
    assert page.statuses("stream") == ["running", "cancelled"]
    about = listed(server.client)[page.events[0][1]["run"]]
    assert about["status"] == "cancelled" and about["chunks"] is None and about["left"] == 0
    video = read_video((server.folder / "output/given up/video_00001_.mp4").read_bytes()).frames
    assert len(about["strips"]) == about["chunk"] >= 2 and len(video) == about["frames"]
    assert apart(page.shown("stream"), video) < CLOSE


@pytest.mark.traceback_expected
def test_a_run_that_fails_says_so(server, page):
    latent = {"latent_tensor": torch.full((1, 16, 1, 8, 8), float("nan")), "latent_format_version_0": torch.tensor([])}
    save_file(latent, server.folder / "input/broken.latent")
    graph = one_sampler(1, initial_latent=["broken", 0]) | {"broken": node("LoadLatent", latent="broken.latent")}
    assert page.run(graph) == "execution_error"
    assert page.statuses("sample") == ["running", "failed"]
    assert listed(server.client)[page.events[0][1]["run"]]["status"] == "failed"


def test_core_shows_the_newest_frame_to_who_has_asked(server, page, preview):
    preview(size=48)
    server.client.free()
    assert page.run(streamed(1.3, "newest/video")) == ENDED
    assert page.pictures and all(picture.format == "JPEG" and picture.size == (48, 48) for picture in page.pictures)
    video = read_video((server.folder / "output/newest/video_00001_.mp4").read_bytes()).frames
    last = np.asarray(page.pictures[-1].resize((64, 64)).convert("RGB"))
    assert apart(last, video[-1]) < 12


def test_the_settings_turn_it_off_and_set_its_size(server, page, preview):
    assert preview(on=True, size=32) == {"on": True, "size": 32}
    server.client.free()
    page.run(streamed(1.3, "small/video"))
    assert [(event["strip"]["width"], event["strip"]["height"]) for event in page.chunks("stream")] == [(32, 32)] * 2
    page.events.clear()
    page.pictures.clear()
    assert preview(on=False) == {"on": False, "size": 256}
    server.client.free()
    page.run(streamed(1.3, "off/video"))
    assert [event["strip"] for event in page.chunks("stream")] == [None, None] and not page.pictures
    assert listed(server.client)[page.events[0][1]["run"]]["strips"] == []


def refusal(ask, *given) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(*given)
    return refused.value.code, refused.value.read().decode()


def test_unknown_names_and_paths_are_not_found(server, page):
    page.run(one_sampler(1, seed=77))
    run = page.events[0][1]["run"]
    assert server.client.get(f"/rolling_kv/runs/{run}/chunks/1.webp")[:4] == b"RIFF"
    wrong = [
        f"/rolling_kv/runs/{run}/chunks/2.webp", f"/rolling_kv/runs/{run}/chunks/0.webp", f"/rolling_kv/runs/{run}/chunks/-1.webp",
        f"/rolling_kv/runs/{run}/chunks/1.png", f"/rolling_kv/runs/{run}/chunks/%D9%A1.webp", f"/rolling_kv/runs/{run}/chunks/01.webp", f"/rolling_kv/runs/{run}/chunks/{'9' * 5000}.webp",
        "/rolling_kv/runs/0000000000000000/chunks/1.webp", f"/rolling_kv/runs/{run.upper()}x/chunks/1.webp",
        f"/rolling_kv/runs/{run}/chunks/..%2f1.webp", "/rolling_kv/runs/..%2f..%2fetc/chunks/1.webp",
        "/rolling_kv/runs/..%2f..%2f..%2f..%2fetc%2fpasswd", f"/rolling_kv/runs/{run}/../../../etc/passwd",
        "/rolling_kv/runs/%2e%2e/%2e%2e/chunks/1.webp", f"/rolling_kv/runs/{run}",
    ]  # fmt: skip
    host = server.client.url.removeprefix("http://")
    for prefix in ("", "/api"):
        for path in wrong:  # as they stand: other clients would tidy them
            connection = http.client.HTTPConnection(host, timeout=60)
            connection.putrequest("GET", prefix + path)
            connection.endheaders()
            assert connection.getresponse().status in (400, 403, 404, 414), path
            connection.close()


def test_a_strip_may_be_kept_for_ever_and_the_list_never(server, page):
    page.run(one_sampler(1, seed=78))
    url = f"{server.client.url}/api{page.chunks('sample')[0]['strip']['url']}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url) as response:
        assert "immutable" in response.headers["Cache-Control"] and response.headers["Content-Type"] == "image/webp"
    with direct.open(f"{server.client.url}/rolling_kv/runs") as response:
        assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"on": "yes"}, "on must be"),
        ({"size": 5}, "size must be"),
        ({"size": 1e9}, "size must be"),
        ([], "JSON object"),
    ],
)
def test_settings_that_are_none_are_refused_in_words(client, body, message):
    status, text = refusal(client.post, "/api/rolling_kv/preview", body)
    assert status == 400 and message in json.loads(text)["error"]


def test_large_requests_are_refused(client):
    assert refusal(client.post, "/api/rolling_kv/preview", {"size": "9" * 70_000})[0] == 413


@pytest.mark.traceback_expected  # the server's own, when it looks for what is left of the body
@pytest.mark.parametrize("name", ["preview", "steer", "plan", "schedule"])
def test_a_body_that_is_not_packed_as_it_says_is_refused_in_words(server, name):
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.client.url}/api/rolling_kv/{name}", b"{}", headers)
    direct, before = urllib.request.build_opener(urllib.request.ProxyHandler({})), len(server.log)
    with pytest.raises(urllib.error.HTTPError) as refused:
        direct.open(request, timeout=60)
    assert refused.value.code == 400 and "gzip" in refused.value.read().decode()
    # The traceback comes behind the answer; it must not come in the next test.
    until = time.monotonic() + 10
    while "RequestPayloadError" not in server.log[before:] and time.monotonic() < until:
        time.sleep(0.05)


@pytest.fixture
def plain_model(server):
    """The bundled model without the numbers of its preview, and a file in the place of a tiny decoder."""
    folder = server.folder / "models/diffusers/plain"
    shutil.copytree(BUNDLED, folder)
    os.remove(folder / "vae/latent_rgb.json")
    decoder = server.folder / "models/vae_approx/taew2_1.pth"
    yield decoder
    decoder.unlink(missing_ok=True)
    shutil.rmtree(folder)


def test_a_tiny_decoder_is_used_where_there_is_one(server, page, plain_model):
    torch.manual_seed(3)
    torch.save(Taehv(16, (8, 8, 8, 8), (1, 2, 2), 1).state_dict(), plain_model)
    result(page, one_sampler(2) | {"model": loaders(model="plain")["model"]})
    assert [event["strip"]["frames"] for event in page.chunks("sample")] == [9, 12]
    assert page.chunks("sample")[0]["strip"]["width"] == 64


def test_a_link_that_leads_nowhere_is_told_of_and_ends_no_run(server, page, plain_model):
    plain_model.symlink_to("gone.pth")
    result(page, one_sampler(2, seed=10) | {"model": loaders(model="plain")["model"]})
    assert [event["strip"]["frames"] for event in page.chunks("sample")] == [3, 3]
    assert "the preview is made without a tiny decoder" in server.log


def test_another_file_in_its_place_is_told_of_and_the_preview_is_a_linear_one(server, page, plain_model):
    torch.save({"decoder.1.weight": torch.ones(2, 2)}, plain_model)
    result(page, one_sampler(2, seed=9) | {"model": loaders(model="plain")["model"]})
    assert [event["strip"]["frames"] for event in page.chunks("sample")] == [3, 3]
    assert page.chunks("sample")[0]["strip"]["width"] == 8
    assert "taew2_1.pth: this holds no TAEHV decoder" in server.log
