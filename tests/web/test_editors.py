"""The schedule editor and the cache inspector on real nodes of the frontend: laid out, undone, and apart from the canvas's own keys."""

import page_answers
import pytest
from browser import until
from live_page import NODE as OF

from rolling_kv.schedules.reading import read_schedule

SCHEDULE = "rolling_kv_prompt_schedule"
NODE = "() => window.app.graph.nodes.find(node => node.type === 'RollingKVPromptSchedule')"
TEXT = f"() => ({NODE})().widgets.find(widget => widget.name === 'text').value"
FIRST = "0: a red circle\n2.0625: a blue circle [cut]\n5.0625: a green square"


@pytest.fixture
def page(live):
    live.stage.answers = {"schedule": page_answers.schedule, "plan": page_answers.plan}
    live.open(SCHEDULE)
    live.look_at(str(live.page.evaluate(f"() => ({NODE})().id")))
    live.page.locator(".rkv-timeline .block").first.wait_for()
    return live.page


def write(page, text):
    """Set the node's text as a user does, and wait until the timeline shows it."""
    page.evaluate(
        f"text => {{ const widget = ({NODE})().widgets.find(made => made.name === 'text'); widget.value = text; widget.callback?.(text) }}",
        text,
    )
    page.wait_for_function(
        "prompts => [...document.querySelectorAll('.rkv-timeline .block .words')].map(made => made.textContent).join() == prompts",
        arg=",".join(segment.text for segment in read_schedule(text).segments),
    )
    page.mouse.click(5, 600)  # what was done is a step of undo


def drag(page, block, pixels):
    box = block.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels / 2, y)
    page.mouse.move(x + pixels, y)
    page.mouse.up()


def becomes(page, text):
    page.wait_for_function(f"text => ({TEXT})() === text", arg=text)


def test_a_drag_writes_the_text_moves_no_node_and_is_undone_in_one_step(page):
    write(page, FIRST)
    blocks = page.locator(".rkv-timeline .block")
    place = page.evaluate(f"() => [...({NODE})().pos]")
    chunk = (blocks.nth(1).bounding_box()["x"] - blocks.nth(0).bounding_box()["x"]) / 2.0625 * 0.75
    drag(page, blocks.nth(1), chunk)
    becomes(page, FIRST.replace("2.0625", "2.8125"))
    assert page.evaluate(f"() => [...({NODE})().pos]") == place
    blocks.nth(1).focus()
    page.keyboard.press("ArrowRight")
    becomes(page, FIRST.replace("2.0625", "3.5625"))
    page.keyboard.press("Control+z")
    becomes(page, FIRST.replace("2.0625", "2.8125"))
    page.keyboard.press("Control+z")
    becomes(page, FIRST)
    page.wait_for_function("() => document.querySelectorAll('.rkv-timeline .block')[1]?.textContent.includes('2.0625')")


def test_keys_on_a_block_are_none_of_the_canvas(page):
    write(page, FIRST)
    count = "() => window.app.graph.nodes.length"
    before = page.evaluate(count)
    page.evaluate(f"() => window.app.canvas.selectItems([({NODE})()])")
    block = page.locator(".rkv-timeline .block").nth(1)
    block.focus()
    page.keyboard.press("Delete")
    becomes(page, "0: a red circle\n5.0625: a green square")
    page.locator(".rkv-timeline .block").nth(1).focus()
    page.keyboard.press("Enter")
    page.keyboard.type("a gray r")  # r, g and the like are shortcuts of the page
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    becomes(page, "0: a red circle\n5.0625: a gray")
    assert page.evaluate(count) == before


def test_both_fit_their_nodes(page):
    page.locator(".rkv-window .strip div").first.wait_for()
    for part in (".rkv-timeline", ".rkv-window"):
        inside = page.locator(part).first.evaluate(
            """made => { const box = made.getBoundingClientRect()
              const lowest = Math.max(...[...made.children].filter(part => part.offsetHeight).map(part => part.getBoundingClientRect().bottom))
              return [lowest, box.bottom, box.width] }"""
        )
        assert inside[0] <= inside[1] + 1 and inside[2] > 200, part


PACKED = """([types, promoted]) => {
  const { graph } = window.app, { node } = graph.convertToSubgraph(new Set(graph.nodes.filter(made => types.includes(made.type))))
  for (const [type, name] of promoted) { // as a line that is drawn to the border does
    const inner = node.subgraph.nodes.find(made => made.type === type)
    node.subgraph.addInput(name, 'STRING').connect(inner.inputs.find(input => input.name === name), inner)
  }
  const of = type => String(node.subgraph.nodes.find(made => made.type === type).id)
  return [String(node.id), ...types.map(of)]
}"""
SET = """([id, name, value]) => {
  const { canvas, graph } = window.app, node = graph.getNodeById(id) ?? graph.getNodeById(Number(id))
  const widget = node.widgets.find(made => made.name === name)
  canvas.emitBeforeChange()
  widget.value = value
  widget.callback?.(value)
  canvas.emitAfterChange()
}"""

RUNS, MUTED, BYPASSED = 0, 2, 4
MODE = f"""([id, mode]) => {{
  const {{ canvas }} = window.app
  canvas.emitBeforeChange()
  ;({OF})(id).mode = mode
  canvas.emitAfterChange()
}}"""


def asked(live, route: str) -> dict:
    """What the page has asked last of a route."""
    return next((body for name, body in reversed(live.stage.posts) if name == route), {})


def test_what_is_in_a_subgraph_is_shown_with_the_values_of_the_subgraphs_node(page, live):
    kinds = ["RollingKVSample", "RollingKVPromptSchedule"]
    promoted = [["RollingKVSample", "width"], ["RollingKVPromptSchedule", "text"]]
    outer, sampler, schedule = page.evaluate(PACKED, [kinds, promoted])
    page.evaluate(SET, [outer, "width", 128])
    page.evaluate(SET, [outer, "text", FIRST])
    until(page, lambda: (asked(live, "plan").get("sampler") or {}).get("width") == 128)
    until(page, lambda: asked(live, "schedule").get("text") == FIRST)
    live.begin(f"{outer}:{sampler}", window=page_answers.WINDOW)
    page.locator(".rkv-window .said", has_text="Now: 51 latent frames made").wait_for()
    page.evaluate(f"id => window.app.canvas.setGraph(({OF})(id).subgraph)", outer)
    page.evaluate("id => window.app.canvas.centerOnNode(window.app.canvas.graph.getNodeById(id))", schedule)
    block = page.locator(".rkv-timeline .block:visible").nth(1)
    block.focus()
    page.keyboard.press("Delete")
    text = f"id => ({OF})(id).widgets.find(made => made.name === 'text').value"
    page.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph)")
    until(page, lambda: page.evaluate(text, outer) == "0: a red circle\n5.0625: a green square")
    until(page, lambda: len(asked(live, "schedule")["model"]["attach"]) == 1)
    bypassed, _ = page.evaluate(PACKED, [["RollingKVAttachCache"], []])
    page.evaluate(MODE, [bypassed, BYPASSED])
    until(page, lambda: asked(live, "schedule")["model"]["attach"] == [])


def test_a_sampler_that_will_not_run_does_not_count(page, live):
    sampler = page.evaluate("() => String(window.app.graph.nodes.find(node => node.type === 'RollingKVSample').id)")
    for mode in (MUTED, BYPASSED):
        until(page, lambda: asked(live, "plan").get("sampler"))
        page.evaluate(MODE, [sampler, mode])
        until(page, lambda: asked(live, "plan")["sampler"] is None)
        page.evaluate(MODE, [sampler, RUNS])
    until(page, lambda: asked(live, "plan").get("sampler"))
    outer, _ = page.evaluate(PACKED, [["RollingKVSample"], []])
    page.evaluate(MODE, [outer, MUTED])
    until(page, lambda: asked(live, "plan")["sampler"] is None)
