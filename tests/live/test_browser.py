"""Each example workflow in the real frontend: nothing missing, no complaints, and it runs with the Run button."""

import itertools
import json

import pytest
from graphs import PACK, api_prompts, bring_state, node, one_sampler, prompt, read_video, sample
from test_prompts import LENGTHS

from tools.comfyui.client import first_file

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


def needed(path) -> list[dict]:
    """The files of a workflow that do not ship."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    return [file for node in workflow["nodes"] for file in node["properties"].get("models", [])]


SHIPPED = [path for path in WORKFLOWS if not needed(path)]
OF_REAL_MODELS = [path for path in WORKFLOWS if needed(path)]


BENCHMARKS = PACK / "workflows/rolling_kv_benchmark.json"

IN_TURN = [
    pytest.param(path, in_vue, id=f"{'nodes-2' if in_vue else 'classic-nodes'}-{path.stem}")
    for path, in_vue in zip(SHIPPED, itertools.cycle([False, True]))
]


def opened(frontend, path) -> list[dict]:
    """The nodes of a workflow that ships with all that it loads."""
    bring_state(frontend.client, api_prompts()[path.stem.removeprefix("rolling_kv_")])
    frontend.refresh()
    nodes = frontend.open_workflow(path)
    assert nodes and all(node["known"] for node in nodes)
    assert frontend.complaints() == ""
    return nodes


def make_small(frontend) -> None:
    """Have samplers make seconds instead of many, and the benchmark measure times in fewer steps.

    As long as they are, all run in test_prompts.py.
    """
    for kind, length in LENGTHS.items():
        frontend.set_widget(kind, length, 1.3)
    for name, value in {"steps.count": 4, "memory": False}.items():
        frontend.set_widget("RollingKVBenchmark", name, value)


@pytest.mark.parametrize(("path", "frontend"), IN_TURN, indirect=["frontend"])
def test_a_workflow_opens_and_runs(frontend, path, tmp_path):
    """Each in one way to draw nodes; the test below opens all in both."""
    nodes = opened(frontend, path)
    make_small(frontend)
    outputs = frontend.press_run(seconds=900)
    frontend.screenshot(tmp_path / f"{path.stem}.png")
    assert frontend.errors_from("RollingKV", "rolling-kv", "rolling_kv") == []
    if any(node["type"] in ("SaveVideo", "RollingKVStreamVideo", "RollingKVCompareVideos") for node in nodes):
        video = read_video(frontend.client.view(first_file(outputs, ".mp4")))
        assert len(video.frames) > 16
    else:
        (shown,) = outputs.values()
        check_table(frontend.page, shown["text"][0])
        assert frontend.client.view(first_file(outputs, ".png")).startswith(b"\x89PNG")


@pytest.fixture
def advanced(frontend):
    """Advanced inputs are shown on all nodes."""
    frontend.set("Comfy.Node.AlwaysShowAdvancedWidgets", True)
    yield
    frontend.set("Comfy.Node.AlwaysShowAdvancedWidgets", False)


def test_workflows_open_and_their_nodes_do_not_cover_each_other_and_have_their_colour(advanced, frontend, tmp_path):
    for path in [*SHIPPED, *OF_REAL_MODELS]:
        opened(frontend, path) if path in SHIPPED else frontend.open_workflow(path)
        frontend.screenshot(tmp_path / f"{path.stem}.png")
        for one, other in itertools.combinations(frontend.rectangles(), 2):
            apart = one["right"] <= other["left"] or other["right"] <= one["left"]
            assert apart or one["bottom"] <= other["top"] or other["bottom"] <= one["top"], (
                f"{path.stem}: {one} {other}"
            )
    colours = "() => window.app.graph.nodes.filter(n => n.type.startsWith('RollingKV')).map(n => [n.color, n.bgcolor])"
    (pair,) = set(map(tuple, frontend.page.evaluate(colours)))
    assert all(pair)


def check_table(page, markdown):
    """The node shows what it put out: a row for each line of the table but the rule below its head."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    page.wait_for_selector("table tr", state="attached")
    assert page.locator("table tr").count() == len(lines) - 1 > 12
    assert page.locator("table tr").last.inner_text().split()[0] == lines[-1].split()[1]


def test_the_table_is_still_there_after_a_look_at_another_tab(frontend):
    """The page closes a workflow's nodes when another one is shown, and makes them anew."""
    frontend.open_workflow(BENCHMARKS)
    make_small(frontend)
    frontend.press_run(seconds=900)
    rows = frontend.page.locator("table tr")
    count = rows.count()
    frontend.open_workflow(PACK / "workflows/rolling_kv_text_to_video.json")
    assert rows.count() == 0
    frontend.page.locator(".workflow-tab", has_text="rolling_kv_benchmark").last.click()
    frontend.page.wait_for_selector("table tr", state="attached")
    assert rows.count() == count > 12


def with_numbers(graph: dict, path):
    """Write an API prompt to a file, its nodes numbered as the page has them; returns the path."""
    numbers = {name: str(number) for number, name in enumerate(graph, 1)}

    def numbered(value):
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    made = {
        numbers[name]: {**part, "inputs": {given: numbered(value) for given, value in part["inputs"].items()}}
        for name, part in graph.items()
    }
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def test_a_state_is_shown_as_a_table_above_its_last_frames(frontend, tmp_path):
    graph = one_sampler(2) | {
        "blue": prompt("a blue | or green circle"),
        "second": sample(1, 2, "blue", state=["sample", 1]),
    }
    graph["look"] = node("RollingKVInspectState", state=["second", 1], model=["model", 0], vae=["vae", 0])
    graph["put away"] = node("RollingKVSaveState", state=["second", 1], filename_prefix="states/shown")
    nodes = frontend.open_workflow(with_numbers(graph, tmp_path / "state.json"))
    assert len(nodes) == len(graph) and all(made["known"] for made in nodes)
    frontend.press_run(seconds=300)
    page, look = frontend.page, list(graph).index("look") + 1
    page.wait_for_selector("table tr", state="attached")
    assert page.locator("table tr").count() == 3
    assert page.locator("table tr").last.locator("td").last.inner_text() == "a blue | or green circle"
    assert "rules: chunks of 3" in page.locator("p", has_text="rules:").inner_text()
    shown = "id => window.app.graph.getNodeById(id)?.imgs?.length ?? document.querySelectorAll(`[data-node-id='${id}'] img`).length"
    page.evaluate("id => window.app.canvas.centerOnNode(window.app.graph.getNodeById(id))", look)
    page.wait_for_function(f"id => ({shown})(id) > 0", arg=look)
    frontend.screenshot(tmp_path / "state.png")
    assert frontend.errors_from("RollingKV", "rolling-kv", "rolling_kv") == []


DROP_FILE = """async ([name, numbers]) => {
  await window.app.handleFile(new File([new Uint8Array(numbers)], name, { type: 'video/mp4' }))
}"""


def test_a_streamed_video_dropped_on_the_canvas_opens_its_graph(frontend, tmp_path):
    graph = one_sampler(1) | {"sample": node(
        "RollingKVStreamVideo", model=["model", 0], positive=["positive", 0], vae=["vae", 0], seconds=0.5, seed=1, width=64,
        height=64, filename_prefix="dropped/video",
    )}  # fmt: skip
    del graph["save"]
    frontend.open_workflow(with_numbers(graph, tmp_path / "stream.json"))
    outputs = frontend.press_run(seconds=300)
    data = frontend.client.view(first_file(outputs, ".mp4"))
    frontend.page.evaluate("() => window.app.graph.clear()")
    frontend.page.evaluate(DROP_FILE, ["video.mp4", list(data)])
    frontend.page.wait_for_function("count => window.app.graph.nodes.length == count", arg=len(graph))
    types = frontend.page.evaluate("() => window.app.graph.nodes.map(node => node.type)")
    assert sorted(types) == sorted(made["class_type"] for made in graph.values())
    frontend.screenshot(tmp_path / "dropped.png")
