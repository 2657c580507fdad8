"""The strip of Attach Rolling Cache and Inspect State: which frames there are, what they take, and what to do where they do not fit."""

import pytest
from bare_page import BarePage
from browser import until
from page_answers import PLAN, WINDOW, plan

from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.planning import last_window

GRAPH = """() => {
  const load = bare.make("RollingKVLoadModel", { model_name: "tiny (bundled)" })
  window.attach = bare.make("RollingKVAttachCache", { window: "this many frames", "window.frames": 9 }, { model: load })
  const lora = bare.make("RollingKVLoadLoRA", {}, { model: attach })
  bare.make("RollingKVSample", { width: 832, height: 480 }, { model: lora })
  window.large = bare.make("RollingKVStreamVideo", { width: 1280, height: 720 }, { model: attach })
}"""


class Inspector(BarePage):
    def __init__(self, page):
        super().__init__(page, ["cache.js"], {"plan": plan})
        self.strip, self.said, self.warning = (
            page.locator(f".rkv-window .{part}") for part in ("strip", "said", "warn")
        )

    def open(self):
        self.page.evaluate(GRAPH)
        self.page.wait_for_function("() => document.querySelector('.rkv-window .said')?.textContent")
        return self

    def change(self, script):
        self.page.evaluate(f"() => {{ {script}; bare.tell('graphChanged') }}")

    def cells(self):
        """The parts of the strip by kind, and how wide each is on the screen."""
        parts = self.strip.locator("> div").all()
        return {part.get_attribute("class").split()[0]: part.bounding_box()["width"] for part in parts}


@pytest.fixture
def inspector(bare):
    return bare(Inspector)


def test_the_plan_is_that_of_the_graph_and_of_its_largest_sampler(inspector):
    inspector.open()
    ((route, body),) = inspector.posts
    assert route == "plan" and body == {
        "model": {
            "load": {"model_name": "tiny (bundled)"},
            "attach": [{"window": "this many frames", "window.frames": 9}],
        },
        "sampler": {"width": 1280, "height": 720},
    }
    assert (
        inspector.strip.get_attribute("aria-label") == "Window: sink 3, left 30, kept 15, being made 3. Latent frames."
    )
    cells = inspector.cells()
    assert cells["kept"] == pytest.approx(5 * cells["writing"], rel=0.05) and cells["sink"] == pytest.approx(
        cells["writing"], rel=0.05
    )
    said = "Planned for 832x480, 12.56 s (self-forcing): 10 GiB of 22 GiB on cuda:0, 30 MiB in main memory"
    assert inspector.said.inner_text() == said
    parts = "weights 3.0 GiB, cache 6.0 GiB, prompts 96 MiB, passes 1.0 GiB"
    assert inspector.page.get_by_role("img", name=parts).count() == 1
    assert inspector.warning.inner_text() == ""


def test_it_asks_again_only_when_something_has_changed(inspector):
    inspector.open()
    inspector.change("")
    inspector.change("attach.widgets[1].value = 12")
    inspector.change("attach.widgets[1].value = 15")
    until(inspector.page, lambda: len(inspector.posts) > 1)
    inspector.page.wait_for_timeout(600)
    assert [body["model"]["attach"][0]["window.frames"] for _, body in inspector.posts] == [9, 15]


def test_what_does_not_fit_is_said_with_what_would(inspector):
    inspector.open()
    remedies = ["set the window to at most 9 latent frames", "or close other programs"]
    inspector.answers["plan"] = lambda body: (200, {**PLAN, "fits": False, "needed": 44 << 30, "remedies": remedies})
    inspector.change("large.widgets[0].value = 4096")
    inspector.warning.get_by_text("This will not fit: set the window to at most 9 latent frames, or close").wait_for()
    assert inspector.warning.get_attribute("role") == "alert"
    assert inspector.page.locator(".room.over").count() == 1


def test_what_cannot_be_planned_is_told_with_the_servers_sentence(inspector):
    inspector.open()
    inspector.answers["plan"] = lambda body: (200, {"error": "height must be a multiple of 16 pixels"})
    inspector.change("large.widgets[1].value = 721")
    inspector.warning.get_by_text("height must be a multiple of 16 pixels").wait_for()
    assert inspector.strip.is_hidden()


def test_a_run_is_shown_as_it_goes(inspector):
    inspector.open()
    run = {
        "node": "5",
        "status": "running",
        "window": WINDOW | {"kept": [3, 6], "writing": [6, 9], "frames": 9, "bytes": 1 << 30},
    }
    inspector.page.evaluate("run => bare.tell('rolling_kv.chunk', run)", run)
    assert inspector.said.inner_text() == "Now: 9 latent frames made, 1.0 GiB in the cache, 22 GiB free"
    assert list(inspector.cells()) == ["sink", "kept", "writing"]
    inspector.page.evaluate("run => bare.tell('rolling_kv.run', run)", run | {"status": "ended"})
    assert inspector.said.inner_text().startswith("At the end of the last run: 9 latent frames")
    inspector.change("attach.widgets[1].value = 12")
    inspector.said.get_by_text("Planned for").wait_for()


def test_a_run_of_another_model_changes_nothing(inspector):
    inspector.open()
    inspector.page.evaluate("() => { bare.make('RollingKVSample', {}) }")
    inspector.page.evaluate(
        "run => bare.tell('rolling_kv.chunk', run)", {"node": "6", "status": "running", "window": WINDOW}
    )
    assert inspector.said.inner_text().startswith("Planned for")


def test_a_state_shows_the_window_from_which_it_goes_on(inspector):
    inspector.page.evaluate("() => { window.look = bare.make('RollingKVInspectState') }")
    assert inspector.page.locator(".rkv-window").count() == 0
    window = WINDOW | {"memory": [20, 21], "writing": [51, 51], "kept": [36, 51]}
    inspector.page.evaluate("window => look.onExecuted({ text: ['a'], window: [window] })", window)
    assert inspector.strip.get_attribute("aria-label") == "Window: sink 3, left 31, memory 2, kept 15. Latent frames."
    assert inspector.said.inner_text() == "51 latent frames; to go on takes a cache of 6.0 GiB, 22 GiB free"
    inspector.page.evaluate("() => look.onExecuted({ text: ['a'], window: [] })")
    assert inspector.page.locator(".rkv-window").count() == 1


def test_a_graph_without_a_model_says_what_is_missing(inspector):
    inspector.page.evaluate("() => { bare.make('RollingKVAttachCache', {}) }")
    inspector.said.get_by_text("Connect a model").wait_for()
    assert inspector.posts == []


def test_the_parts_are_those_of_the_window(inspector):
    for cache, frames in ((CacheConfig(21, sink=3), 60), (CacheConfig("all", sink=1), 30), (CacheConfig(9), 3)):
        window = last_window(SamplingConfig(), cache, frames)
        held = len(window.frames())
        about = {"sink": cache.sink, "memory": [], "kept": [max(window.oldest, cache.sink), window.end],
                 "writing": [window.end, frames]}  # fmt: skip
        parts = inspector.page.evaluate(
            "async window => (await import('/extensions/rolling-kv/window.js')).partsOf(window)", about
        )
        assert sum(count for kind, count in parts if kind != "left") == held
        assert sum(count for _, count in parts) == frames
