"""Compare Videos in the page: two videos in step, with a wipe and side by side, by mouse and by keyboard."""

import io
import json

import numpy as np
import pytest
from browser import until
from graphs import node
from PIL import Image
from test_browser import with_numbers

RED, BLUE = (254, 0, 0), (0, 0, 254)
FPS, FRAMES = 8, (24, 12)


def compared(**names) -> dict:
    """A prompt that compares a red video with a blue one that is shorter and of another shape."""
    graph = {}
    for name, colour, frames, width in (("red", 0xFF0000, FRAMES[0], 64), ("blue", 0x0000FF, FRAMES[1], 96)):
        graph[name] = node("EmptyImage", width=width, height=64, batch_size=frames, color=colour)
        graph[f"{name} video"] = node("CreateVideo", images=[name, 0], fps=float(FPS))
    graph["compare"] = node("RollingKVCompareVideos", first=["red video", 0], second=["blue video", 0], **names)
    return graph


class Comparison:
    """The widget of the node in a page."""

    def __init__(self, frontend, number: int):
        self.page = frontend.page
        self.page.evaluate("id => window.app.canvas.centerOnNode(window.app.graph.getNodeById(id))", number)
        self.root = self.page.locator("[role=group]", has=self.page.locator("video"))
        self.root.wait_for()
        self.videos = self.root.locator("video")  # the page may have others from tests before
        until(self.page, lambda: self.videos.evaluate_all("videos => videos.every(video => video.readyState > 1)"))
        self.stage = self.root.locator("> div").first

    def button(self, label: str):
        return self.root.get_by_role("button", name=label)

    def slider(self, label: str):
        return self.root.get_by_role("slider", name=label)

    def pause(self) -> None:
        self.button("Pause").click()
        self.button("Play").wait_for()

    def times(self) -> list[float]:
        """What is shown of the first and of the second video, in seconds."""
        until(self.page, lambda: self.videos.evaluate_all("videos => videos.every(video => !video.seeking)"))
        second, first = self.videos.evaluate_all("videos => videos.map(video => video.currentTime)")
        return [first, second]

    def colours(self, *places: tuple[float, float]) -> list[str]:
        """Which video is seen at places, in shares of width and height; "" where none is."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_timeout(300)  # until it is painted
        picture = np.asarray(Image.open(io.BytesIO(self.stage.screenshot())).convert("RGB"), dtype=int)
        height, width = picture.shape[:2]
        seen = (picture[int(y * height), int(x * width)] for x, y in places)
        return ["red" if r > 150 > 60 > b else "blue" if b > 150 > 60 > r else "" for r, _, b in seen]


@pytest.fixture
def comparison(frontend, tmp_path):
    graph = compared(first_name="seed 1", second_name="seed <b>2</b>")
    (*_, number) = range(1, len(graph) + 1)
    frontend.open_workflow(with_numbers(graph, tmp_path / "compare.json"))
    frontend.press_run()
    made = Comparison(frontend, number)
    yield made
    frontend.screenshot(tmp_path / "compare.png")
    assert frontend.errors_from("RollingKV", "rolling-kv", "rolling_kv") == []


def test_two_videos_in_step_with_a_wipe(comparison, tmp_path):
    shown = comparison
    shown.pause()
    assert shown.stage.inner_text().split("\n") == ["seed 1", "seed <b>2</b>"]
    halves = (0.25, 0.5), (0.75, 0.5)
    assert shown.colours(*halves) == ["red", "blue"]
    shown.slider("Frame").fill("5")
    assert shown.times() == [pytest.approx(5.5 / FPS)] * 2
    shown.button("One frame on").click()
    assert shown.times() == [pytest.approx(6.5 / FPS)] * 2
    shown.slider("Frame").fill("20")
    assert shown.times() == [pytest.approx(20.5 / FPS), pytest.approx((FRAMES[1] - 0.5) / FPS)]
    assert shown.colours(*halves) == ["red", "blue"]  # the shorter one shows its last frame
    assert "21/24" in shown.root.inner_text()

    wipe = shown.slider("Wipe")
    wipe.press("Home")
    assert shown.colours(*halves) == ["blue", "blue"] and wipe.get_attribute("aria-valuetext").startswith("0 %")
    wipe.press("End")
    assert shown.colours(*halves) == ["red", "red"]
    box = shown.stage.bounding_box()
    shown.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    shown.page.mouse.down()
    shown.page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2, steps=4)
    shown.page.mouse.up()
    assert shown.colours((0.35, 0.5), (0.45, 0.5)) == ["red", "blue"]
    assert shown.stage.bounding_box() == box  # the node has not been moved with it

    shown.button("Side by side").click()
    assert shown.colours(*halves) == ["red", "blue"] and wipe.is_disabled()
    assert shown.colours((0.75, 0.04)) == [""]  # the wider one has bars
    shown.page.screenshot(path=tmp_path / "side by side.png")

    shown.button("Play").click()
    shown.page.wait_for_function(
        "() => [...document.querySelectorAll('video')].some(video => !video.paused && video.currentTime < 1)"
    )
    shown.page.keyboard.press("Tab")
    shown.pause()
    first, second = shown.times()
    assert second == pytest.approx(min(first, (FRAMES[1] - 0.5) / FPS), abs=0.3)


def test_what_it_puts_out_are_the_videos_as_they_came(client):
    graph = compared()
    for name in ("first", "second"):
        number = ("first", "second").index(name)
        graph[name] = node(
            "SaveVideo", video=["compare", number], filename_prefix=f"compared/{name}", format="auto", codec="auto"
        )
    outputs = client.run(graph)
    facts = [
        (film["frames"], film["fps"], film["width"], film["type"], film["name"])
        for film in outputs["compare"]["compared"]
    ]
    assert facts == [(24, 8.0, 64, "temp", ""), (12, 8.0, 96, "temp", "")]
    assert json.dumps(outputs["first"]) != json.dumps(outputs["second"])
