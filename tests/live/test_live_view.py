"""The live view on a real server: it grows with the video, comes back after a reload, and what is said there is done."""

import json

import numpy as np
import pytest
from browser import RUN_BUTTON, until
from graphs import loaders, node, prompt, read_video
from live_page import CENTRE, NODE
from test_browser import with_numbers

from tools.comfyui.client import first_file

OURS = ("RollingKV", "rolling-kv", "rolling_kv")
PIXELS = """canvas => {
  const { data, width, height } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
  return [canvas.dataset.frame, width, height, [...data]]
}"""
CENTRE_OPEN = "() => { const { canvas } = window.app; canvas.ds.scale = 1; canvas.centerOnNode(canvas.graph.nodes[0]) }"
OUT = "() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph)"


def streaming(seconds: float, name: str, size: int = 64) -> dict:
    """A prompt whose node "stream" makes a video of so many seconds; 0: until it is stopped."""
    values = {"model": ["model", 0], "positive": ["positive", 0], "vae": ["vae", 0], "seconds": seconds, "seed": 1}
    values |= {"width": size, "height": size, "filename_prefix": f"live/{name}"}
    return loaders() | {
        "positive": prompt("a red circle moving right"),
        "stream": node("RollingKVStreamVideo", **values),
    }


def opened(frontend, graph, path) -> str:
    """Open a prompt in the page and look at its node "stream"; returns its id."""
    frontend.open_workflow(with_numbers(graph, path / "stream.json"))
    number = str(list(graph).index("stream") + 1)
    frontend.page.evaluate(CENTRE, number)
    return number


def newest_run(client) -> dict:
    return json.loads(client.get("/rolling_kv/runs"))["runs"][-1]


def begin(frontend) -> None:
    """Press Run, and wait until the sampler runs: pages also show what earlier tests have made."""
    frontend.page.evaluate("() => { window.finishedRun = null }")
    frontend.page.locator(RUN_BUTTON).click()
    runs = lambda: json.loads(frontend.client.get("/rolling_kv/runs"))["runs"]  # noqa: E731
    until(frontend.page, lambda: [run for run in runs() if run["status"] == "running"])


def shown_frames(frontend, run, until):
    """Frames that the canvas shows, by their number in the run, until one of the numbers is among them."""
    canvas = frontend.page.locator(".rkv-live:visible canvas")
    begins = dict(
        zip((s["chunk"] for s in run["strips"]), np.cumsum([0, *(s["frames"] for s in run["strips"])]).tolist())
    )
    seen = {}
    while not seen.keys() & set(until):
        frame, width, height, data = canvas.evaluate(PIXELS)
        chunk, index = map(int, frame.split(":"))
        seen[begins[chunk] + index] = np.array(data, dtype=int).reshape(height, width, 4)[..., :3]
        frontend.page.wait_for_timeout(40)
    return seen


def test_what_it_plays_is_the_video(every_frontend, tmp_path):
    frontend, page = every_frontend, every_frontend.page
    opened(frontend, streaming(2.0, tmp_path.name), tmp_path)  # the name is new each time, so that it is not cached
    outputs = frontend.press_run(seconds=300)
    page.locator(".rkv-live:visible canvas").wait_for()
    run = newest_run(frontend.client)
    assert run["status"] == "ended" and run["chunk"] == run["chunks"] == 3
    video = read_video(frontend.client.view(first_file(outputs, ".mp4"))).frames.astype(int)
    assert len(video) == run["frames"] == sum(strip["frames"] for strip in run["strips"])
    for number, picture in shown_frames(frontend, run, range(len(video) - 12, len(video))).items():
        assert np.abs(picture - video[number]).mean() < 8, number
    assert page.locator(".rkv-live:visible .numbers").inner_text().startswith("done · chunk 3 of 3")
    frontend.screenshot(tmp_path / "smoke.png")
    assert frontend.errors_from(*OURS) == []


@pytest.fixture(autouse=True)
def nothing_runs_on(client):
    """After a test that failed."""
    yield
    client.interrupt()


@pytest.fixture
def classic(pages, client):
    return pages.of(client, False)


@pytest.mark.parametrize("fresh_frontend", [False], ids=["classic-nodes"], indirect=True)
def test_it_grows_and_is_there_again_after_a_reload_and_in_another_tab(fresh_frontend, tmp_path):
    frontend, page, client = fresh_frontend, fresh_frontend.page, fresh_frontend.client
    number = opened(frontend, streaming(0, "reload"), tmp_path)
    begin(frontend)
    chunk = "() => Number(document.querySelector('.rkv-live canvas')?.dataset.frame?.split(':')[0] ?? 0)"
    page.wait_for_function(f"() => ({chunk})() >= 1")
    page.wait_for_function(f"() => ({chunk})() >= 2")
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    page.wait_for_function("() => window.app?.vueAppReady && window.app.graph?.nodes.length")
    page.wait_for_function(f"id => ({NODE})(id)", arg=number)
    page.evaluate(CENTRE, number)
    page.locator(".rkv-live:visible canvas").wait_for()
    before = newest_run(client)["chunk"]
    page.wait_for_function(f"chunk => ({chunk})() > chunk", arg=before)
    tab = page.context.new_page()
    tab.goto(client.url)  # it opens the workflow that the other one has
    tab.wait_for_function(f"chunk => ({chunk})() > chunk", arg=newest_run(client)["chunk"])
    tab.get_by_role("button", name="Pause").wait_for()
    tab.evaluate(CENTRE, number)  # it has grown
    tab.get_by_role("button", name="Pause").click()
    until(page, lambda: newest_run(client)["waiting"])
    for each in (page, tab):
        each.bring_to_front()
        each.locator(".rkv-live:visible .numbers", has_text="paused").wait_for()
    client.interrupt()
    until(page, lambda: newest_run(client)["status"] == "cancelled")
    for each in (page, tab):
        each.bring_to_front()
        each.locator(".rkv-live:visible .numbers", has_text="cancelled").wait_for()
    assert page.locator(".rkv-steering").is_hidden()
    assert frontend.errors_from(*OURS) == []


def redness(picture) -> float:
    """Above 0 where what stands out in a picture is red, below where it is blue."""
    picture = np.asarray(picture, dtype=int)
    vivid = picture.max(-1) - picture.min(-1) > 60
    return float((picture[..., 0] - picture[..., 2])[vivid].mean())


def test_what_is_typed_while_it_runs_is_made(classic, tmp_path):
    frontend, page, client = classic, classic.page, classic.client
    number = opened(frontend, streaming(0, "steered"), tmp_path)
    begin(frontend)
    page.wait_for_function("() => document.querySelector('.rkv-live canvas')?.dataset.frame")
    page.get_by_role("button", name="Pause").wait_for()
    page.evaluate(CENTRE, number)  # it has grown
    page.get_by_role("button", name="Pause").click()
    until(page, lambda: newest_run(client)["waiting"])
    paused = newest_run(client)
    page.get_by_label("How the prompt comes").select_option("cut")
    prompt_line = page.get_by_label("What shall happen next")
    prompt_line.fill("a blue circle moving right")
    prompt_line.press("Enter")
    page.locator(".rkv-steering .answer", has_text="From the next chunk on: a blue circle moving right").wait_for()
    assert newest_run(client)["chunk"] == paused["chunk"]
    page.get_by_role("button", name="Resume").click()
    until(page, lambda: newest_run(client)["chunk"] >= paused["chunk"] + 2)
    page.get_by_role("button", name="Stop here").click()
    page.wait_for_function("() => window.finishedRun")
    finished = page.evaluate("() => window.finishedRun")
    assert finished["kind"] == "execution_success"
    run = newest_run(client)
    assert run["status"] == "ended" and "a blue circle moving right [cut]" in run["schedule"]
    video = read_video(client.view(first_file(client.outputs(finished["prompt_id"]), ".mp4"))).frames
    assert redness(video[0]) > 30 and redness(video[-1]) < -30
    shown = shown_frames(frontend, run, range(run["frames"] - 12, run["frames"]))
    assert redness(shown[max(shown)]) < -30
    assert frontend.errors_from(*OURS) == []


def test_inside_a_subgraph_of_a_real_prompt(classic, tmp_path):
    frontend, page = classic, classic.page
    number = opened(frontend, streaming(1.2, "subgraph"), tmp_path)
    outer = page.evaluate(f"id => String(window.app.graph.convertToSubgraph(new Set([({NODE})(id)])).node.id)", number)
    page.evaluate(f"id => window.app.canvas.setGraph(({NODE})(id).subgraph)", outer)
    page.evaluate(CENTRE_OPEN)
    frontend.press_run(seconds=300)
    page.locator(".rkv-live:visible canvas").wait_for()
    assert newest_run(frontend.client)["node"].startswith(f"{outer}:")
    page.evaluate(OUT)
    assert frontend.errors_from(*OURS) == []


def test_the_node_of_a_subgraph_shows_what_is_made_in_it(frontend, tmp_path):
    page, client = frontend.page, frontend.client
    graph = streaming(0, tmp_path.name) | {"cache": node("RollingKVAttachCache", model=["model", 0])}
    graph["stream"]["inputs"]["model"] = ["cache", 0]
    number = opened(frontend, graph, tmp_path)
    outer = page.evaluate(f"id => String(window.app.graph.convertToSubgraph(new Set([({NODE})(id)])).node.id)", number)
    page.evaluate(CENTRE, outer)
    begin(frontend)
    page.wait_for_function("() => document.querySelector('.rkv-live canvas')?.dataset.frame")
    assert page.locator(".rkv-live:visible canvas").count() == 1
    assert page.locator(f"[data-node-id='{outer}'] img:visible").count() == 0  # ComfyUI's own picture is not beside it
    page.locator(".rkv-window .said", has_text="Now:").wait_for()
    client.interrupt()
    until(page, lambda: newest_run(client)["status"] == "cancelled")
    assert frontend.errors_from(*OURS) == []
