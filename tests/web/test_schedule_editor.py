"""The timeline of Prompt Schedule: what is done there is in the node's text, in the form that the engine reads and writes."""

import random
import re

import page_answers
import pytest
from bare_page import BarePage

from rolling_kv.config import SamplingConfig
from rolling_kv.schedules.reading import read_schedule
from rolling_kv.schedules.timeline import shown_in_seconds

TEXT = "0: a red circle\n2.0625: a blue circle [recache]\n5.0625: a green square [cut]\n10.3125: [end]"


class Editor(BarePage):
    """A page with one Prompt Schedule."""

    def __init__(self, page, theme="dark"):
        super().__init__(page, ["schedule.js"], {"schedule": page_answers.schedule}, theme)
        self.blocks = page.locator(".block")
        self.said = page.locator(".said")
        self.end = page.locator(".end")
        self.way = page.get_by_label("How this prompt begins")

    def open(self, text=TEXT, wires="{}"):
        self.page.evaluate(
            f"text => {{ window.schedule = bare.make('RollingKVPromptSchedule', {{ text, count_from: 'video' }}, {wires}) }}",
            text,
        )
        self.page.wait_for_function("() => document.querySelector('.said')?.textContent")
        return self

    @property
    def text(self):
        return self.page.evaluate("() => window.schedule.widgets[0].value")

    @property
    def steps(self):
        """The texts after each step of undo."""
        return [step[-1]["text"] for step in self.page.evaluate("() => bare.steps")]

    def times(self):
        return [segment.time for segment in read_schedule(self.text).segments]

    def shown(self):
        return [tuple(block.inner_text().split("\n")) for block in self.blocks.all()]

    def drag(self, handle, pixels):
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + pixels / 2, y)
        self.page.mouse.move(x + pixels, y)
        self.page.mouse.up()

    def pixels(self, seconds):
        """How far apart two times are on the screen."""
        places = [self.blocks.nth(number).bounding_box()["x"] for number in (0, 1)]
        return seconds * (places[1] - places[0]) / self.times()[1]


@pytest.fixture
def editor(bare):
    return bare(Editor)


def test_nothing_is_asked_for_a_node_of_a_subgraph_that_is_no_more(editor):
    """The frontends around 1.45 leave it in its graph when another workflow is opened; so does each undo."""
    editor.open()
    leave = "{ id: 'gone', nodes: [schedule], getNodeById: () => schedule }; schedule.widgets[0].value = '0: a wombat'"
    editor.page.evaluate(f"() => {{ schedule.graph = {leave}; bare.tell('graphChanged') }}")
    editor.page.wait_for_timeout(400)
    assert "0: a wombat" not in [body["text"] for _, body in editor.posts]


def test_each_prompt_is_a_block_where_it_is_in_time(editor):
    editor.open()
    assert editor.shown() == [
        ("a red circle", "0 s"), ("a blue circle", "2.0625 s · recache"), ("a green square", "5.0625 s · cut"),
    ]  # fmt: skip
    boxes = [block.bounding_box() for block in editor.blocks.all()]
    second = boxes[1]["x"] - boxes[0]["x"]
    assert boxes[2]["x"] - boxes[0]["x"] == pytest.approx(second * 5.0625 / 2.0625, abs=2)
    assert boxes[0]["x"] + boxes[0]["width"] == pytest.approx(boxes[1]["x"], abs=2)
    assert "Chunks of 0.75 s, as most models make them" in editor.said.inner_text()
    assert editor.text == TEXT and editor.steps == []


def test_a_block_dragged_by_a_chunk_begins_a_chunk_later(editor):
    editor.open().drag(editor.blocks.nth(1), editor.pixels(0.75))
    assert editor.text == TEXT.replace("2.0625", "2.8125")
    assert editor.steps == [editor.text]
    assert editor.blocks.nth(1).inner_text().endswith("2.8125 s · recache")


def test_it_stays_between_its_neighbours_and_the_first_where_it_is(editor):
    editor.open().drag(editor.blocks.nth(1), 1000)
    assert editor.times() == [0, 4.3125, 5.0625]
    editor.drag(editor.blocks.nth(1), -1000)
    assert editor.times() == [0, 0.5625, 5.0625]
    editor.drag(editor.blocks.nth(0), 100)
    assert editor.times() == [0, 0.5625, 5.0625] and len(editor.steps) == 2


def test_a_drag_counts_in_the_pixels_of_a_canvas_that_is_zoomed(editor):
    editor.open()
    editor.page.evaluate("() => { window.schedule.box.style.transform = 'scale(0.5)' }")
    editor.drag(editor.blocks.nth(1), editor.pixels(1.5))
    assert editor.times() == [0, 3.5625, 5.0625]


def test_an_answer_that_comes_during_a_drag_does_not_end_it(editor):
    editor.open()
    editor.page.evaluate(
        """() => { const ask = fetch
          window.fetch = (...all) => new Promise(go => { window.answer = go }).then(() => ask(...all)) }"""
    )
    editor.blocks.nth(1).focus()
    editor.page.keyboard.press("ArrowRight")
    editor.page.wait_for_function("() => window.answer")
    box, chunk = editor.blocks.nth(1).bounding_box(), editor.pixels(0.75)
    x, y = box["x"] + 20, box["y"] + 10
    editor.page.mouse.move(x, y)
    editor.page.mouse.down()
    editor.page.mouse.move(x + chunk / 2 + 4, y)
    assert editor.blocks.nth(1).inner_text().endswith("3.5625 s · recache")
    editor.page.evaluate("() => window.answer()")
    editor.page.wait_for_function("() => document.querySelectorAll('.block')[1].textContent.includes('2.8125')")
    editor.page.mouse.move(x + chunk, y)
    assert editor.blocks.nth(1).inner_text().endswith("3.5625 s · recache")
    editor.page.mouse.up()
    assert editor.text == TEXT.replace("2.0625", "3.5625") and len(editor.steps) == 2


def test_an_edit_of_an_older_text_does_not_replace_what_is_typed(editor):
    editor.open()
    editor.page.evaluate(
        """() => { const [text] = schedule.widgets; text.value = "0: one\\n2.0625: two"; text.callback(text.value)
          document.querySelectorAll(".block")[1].dispatchEvent(new KeyboardEvent("keydown", { key: "Delete" })) }"""
    )
    editor.page.wait_for_function("() => document.querySelectorAll('.block')[1]?.textContent.includes('two')")
    assert editor.text == "0: one\n2.0625: two" and editor.steps == []
    editor.blocks.nth(1).focus()
    editor.page.keyboard.press("ArrowRight")
    assert editor.text == "0: one\n2.8125: two"


def test_a_drag_of_the_end_follows_the_pointer(editor):
    editor.open()
    before = editor.end.bounding_box()
    x, y = before["x"] + 6, before["y"] + 20
    editor.page.mouse.move(x, y)
    editor.page.mouse.down()
    editor.page.mouse.move(x - editor.pixels(3), y)
    assert editor.end.bounding_box()["x"] == pytest.approx(before["x"] - editor.pixels(3), abs=2)
    editor.page.mouse.up()
    assert editor.text == TEXT.replace("10.3125", "7.3125")


def test_keys_move_edit_and_remove(editor):
    editor.open()
    block = editor.blocks.nth(1)
    block.focus()
    editor.page.keyboard.press("ArrowRight")
    editor.page.keyboard.press("ArrowRight")
    editor.page.keyboard.press("ArrowLeft")
    assert editor.times() == [0, 2.8125, 5.0625] and len(editor.steps) == 3
    editor.page.keyboard.press("Enter")
    field = editor.page.get_by_label("Text of the prompt")
    assert field.input_value() == "a blue circle"
    field.fill("  a blue\tsquare ")
    editor.page.keyboard.press("Enter")
    assert editor.text.split("\n")[1] == "2.8125: a blue square [recache]"
    assert editor.page.evaluate("() => document.activeElement.className.includes('block')")
    editor.page.keyboard.press("Enter")
    field.fill("something else")
    editor.page.keyboard.press("Escape")
    assert "something else" not in editor.text and field.count() == 0
    editor.page.keyboard.press("Delete")
    assert editor.text == "0: a red circle\n5.0625: a green square [cut]\n10.3125: [end]"
    editor.page.keyboard.press("Delete")
    editor.page.keyboard.press("Delete")
    assert editor.text == "0: a green square [cut]\n10.3125: [end]", "the last prompt stays"


def test_it_is_edited_in_place_by_a_double_click(editor):
    editor.open().blocks.nth(2).dblclick()
    editor.page.get_by_label("Text of the prompt").fill("a [green] square ]")
    editor.blocks.nth(0).click()
    assert editor.text.split("\n")[2] == "5.0625: a [green] square ] [cut]"
    editor.blocks.nth(2).focus()
    editor.way.select_option("")
    assert editor.text.split("\n")[2] == "5.0625: a [green] square ] []"


def test_the_way_of_switching_is_chosen_for_each_prompt(editor):
    editor.open().blocks.nth(1).focus()
    assert editor.way.input_value() == "recache"
    words = [option.get_attribute("value") for option in editor.way.locator("option").all()]
    for word in words:
        editor.way.select_option(word)
        over = {"blend": " 3", "slerp": " 3"}.get(word, "")
        assert read_schedule(editor.text).segments[1].words == (f"[{word}{over}]" if word else "")
    chunks = editor.page.get_by_label("Over how many chunks")
    chunks.fill("7")
    chunks.press("Tab")
    assert editor.text.split("\n")[1] == "2.0625: a blue circle [slerp 7]"
    assert len(editor.steps) == len(words) + 1


def test_prompts_are_added_and_split_and_the_end_is_set(editor):
    button = lambda name: editor.page.get_by_role("button", name=name, exact=True)  # noqa: E731
    editor.open("0: a\n2.0625: b").blocks.nth(0).focus()
    button("Split").click()
    assert editor.text == "0: a\n1.3125: a\n2.0625: b"
    button("Add").click()
    editor.page.get_by_label("Text of the prompt").fill("c")
    editor.page.keyboard.press("Enter")
    assert editor.text == "0: a\n1.3125: a\n2.0625: b\n7.3125: c"
    assert editor.end.is_hidden()
    button("End").click()
    end = read_schedule(editor.text).end
    assert end and end > 7.3125 and editor.end.is_visible()
    editor.end.focus()
    editor.page.keyboard.press("ArrowRight")
    assert read_schedule(editor.text).end == end + 0.75
    editor.page.keyboard.press("Delete")
    assert read_schedule(editor.text).end is None


def test_a_text_in_another_form_is_rewritten_by_the_first_edit_only(editor):
    other = '"0": "a red circle", "24": "a blue circle"'
    editor.open(other)
    assert "another form" in editor.said.inner_text() and "FizzNodes" in editor.said.inner_text()
    assert editor.blocks.count() == 2 and editor.text == other and editor.steps == []
    editor.blocks.nth(1).focus()
    editor.page.keyboard.press("ArrowRight")
    assert editor.text == "0: a red circle [hold]\n2.8125: a blue circle [hold]"


def test_an_unreadable_text_is_told_of_and_left_alone(editor):
    editor.open("0: a\n2: b [cutt]")
    assert "[cutt] is none of" in editor.said.inner_text()
    assert editor.blocks.count() == 0 and editor.text == "0: a\n2: b [cutt]"
    assert all(
        button.is_disabled()
        for button in editor.page.get_by_role("button", name=re.compile("Add|Split|Remove|End")).all()
    )
    editor.page.evaluate("() => { const [text] = schedule.widgets; text.value = '0: a'; text.callback(text.value) }")
    editor.page.wait_for_function("() => document.querySelectorAll('.block').length == 1")
    assert "none of" not in editor.said.inner_text()


def test_what_is_typed_meanwhile_is_not_written_over(editor):
    editor.open()
    texts = ["0: one", "0: one\n2: two", "0: one\n2: two\n4: three"]
    for text in texts:
        editor.page.evaluate("text => { const [own] = schedule.widgets; own.value = text; own.callback(text) }", text)
    editor.page.wait_for_function(
        "() => document.querySelectorAll('.block').length == 3 && !document.querySelector('.end').offsetParent"
    )
    assert editor.text == texts[-1] and editor.steps == []
    assert len(editor.posts) == 2, "the server is asked once for what is typed in one go"


def test_a_prompt_between_two_chunks_says_where_it_begins(editor):
    editor.open("0: a\n2.5: b\n2.6: c")
    assert "with the chunk that begins at 2.8125 s" in editor.blocks.nth(2).get_attribute("aria-valuetext")
    assert "out" in editor.blocks.nth(1).get_attribute("class").split(), "the later one begins with that chunk"
    editor.blocks.nth(2).focus()
    editor.page.keyboard.press("ArrowRight")
    assert editor.times() == [0, 2.5, 2.8125]


def test_screen_readers_are_told_what_each_part_is(editor):
    editor.open()
    block = editor.page.get_by_role("slider", name="Prompt 2 of 3: a blue circle")
    assert block.get_attribute("aria-valuenow") == "2.0625"
    assert block.get_attribute("aria-valuetext") == "at 2.0625 s, recache"
    assert editor.page.get_by_role("slider", name="End of the video").count() == 1
    assert editor.page.get_by_role("toolbar", name="Edit the schedule").count() == 1
    unnamed = "() => [...document.querySelectorAll('button, select, input')].filter(made => !made.textContent && !made.ariaLabel)"
    assert editor.page.evaluate(f"({unnamed})().length") == 0
    assert editor.said.get_attribute("role") == "status"


def test_without_the_models_file_the_text_is_shown_with_the_chunks_of_most(editor):
    answer = editor.answers["schedule"]
    editor.answers["schedule"] = lambda body: (
        (200, {"error": "The model was not found."}) if body["model"] else answer(body)
    )
    editor.page.evaluate("() => { window.load = bare.make('RollingKVLoadModel', { model_name: 'a' }) }")
    editor.open(wires="{ model: window.load }")
    assert "The model was not found." in editor.said.inner_text() and editor.blocks.count() == 3


def test_the_grid_is_that_of_the_wired_model_or_of_the_sampler(editor):
    editor.page.evaluate("() => { window.load = bare.make('RollingKVLoadModel', { model_name: 'a' }) }")
    editor.open(wires="{ model: window.load }")
    assert editor.posts[-1][1]["model"] == {"load": {"model_name": "a"}, "attach": []}
    assert "(self-forcing)" in editor.said.inner_text()


def test_the_model_of_the_sampler_counts_where_none_is_wired(editor):
    editor.open()
    editor.page.evaluate(
        """() => { const load = bare.make("RollingKVLoadModel", { model_name: "a" })
          const attach = bare.make("RollingKVAttachCache", { window: "all frames" }, { model: load })
          bare.make("RollingKVSample", { length: 20 }, { model: attach, positive: window.schedule })
          bare.tell("graphChanged") }"""
    )
    editor.page.wait_for_function("() => document.querySelector('.said').textContent.includes('self-forcing')")
    assert editor.posts[-1][1] == {
        "text": TEXT, "model": {"load": {"model_name": "a"}, "attach": [{"window": "all frames"}]}, "sampler": {"length": 20},
    }  # fmt: skip


def test_a_run_shows_how_far_it_is(editor):
    editor.open()
    assert editor.page.locator(".playhead").is_hidden()
    editor.page.evaluate("() => { window.sampler = bare.make('RollingKVSample', {}, { positive: window.schedule }) }")
    run = {"node": "2", "first_seconds": 2.0, "seconds": 0.0625, "status": "running"}
    editor.page.evaluate("run => bare.tell('rolling_kv.chunk', run)", run)
    mark, block = editor.page.locator(".playhead").bounding_box(), editor.blocks.nth(1).bounding_box()
    assert mark["x"] == pytest.approx(block["x"], abs=2)
    editor.page.evaluate("run => bare.tell('rolling_kv.run', run)", run | {"status": "ended"})
    assert editor.page.locator(".playhead").is_hidden()


def test_a_long_schedule_is_zoomed_and_scrolled(editor):
    lines = [f"{number * 30}: prompt {number}" for number in range(120)]
    editor.open("\n".join(lines))
    view = editor.page.locator(".view")
    width = "made => [made.scrollWidth, made.clientWidth]"
    whole = view.evaluate(width)
    assert whole[0] == whole[1] and editor.blocks.count() == 120
    editor.page.get_by_label("Closer").click()
    editor.page.get_by_label("Closer").click()
    closer = view.evaluate(width)
    assert closer[0] > 3 * closer[1]
    editor.blocks.nth(119).focus()
    assert view.evaluate("made => made.scrollLeft") > closer[1]
    editor.page.get_by_label("All of it").click()
    assert view.evaluate(width) == whole


EDITS = """async ([schedule, grid, seconds, steps]) => {
  const edits = await import("/extensions/rolling-kv/prompts.js"), texts = []
  let now = schedule
  for (const [name, place, by] of steps) {
    const index = Math.floor(place * now.segments.length)
    if (name == "moved") now = edits.moved(now, index, edits.stepped(grid, now.segments[index].time, by), grid)
    if (name == "ended") now = edits.moved({ ...now, end: now.end ?? seconds }, now.segments.length, by * 3, grid)
    if (name == "removed") now = edits.removed(now, index)
    if (name == "appended") now = edits.appended(now, `prompt ${by}]`, grid)
    if (name == "split") now = edits.split(now, index, seconds, grid)
    if (name == "way") now = edits.changed(now, index, { how: ["", "cut", "blend 4"][Math.abs(by) % 3] })
    texts.push(edits.write(now))
  }
  return texts
}"""


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_edited_the_engine_reads_and_writes_the_same(editor, seed):
    rng = random.Random(seed)
    sampling = SamplingConfig(chunk=rng.choice((1, 3, 8)), independent_first_frame=bool(seed % 2))
    read = shown_in_seconds("0: a\n2.5: b [cut]\n6: c [x] []", sampling).about()
    names = ["moved", "moved", "ended", "removed", "appended", "split", "way"]
    steps = [(rng.choice(names), rng.random(), rng.randint(-40, 40)) for _ in range(150)]
    schedule = {"segments": read["segments"], "end": read["end"]}
    texts = editor.page.evaluate(EDITS, [schedule, read["grid"], read["seconds"], steps])
    for text, step in zip(texts, steps):
        assert str(read_schedule(text)) == text, step
    assert len(set(texts)) > 30
