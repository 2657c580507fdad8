"""What a run looks like on its node: it plays what exists, says how far it is, and takes prompts; without a server's help."""

import json
import struct
import threading
from uuid import uuid4

import pytest
from browser import until
from live_page import NODE, colour, put_strip, told

ONE_RENDERER = pytest.mark.parametrize("live", ["classic"], indirect=True)
T2V = "rolling_kv_text_to_video"


def opened_at_sampler(live, workflow=T2V):
    node = live.open(workflow)[0]
    live.look_at(node)
    return node


def test_it_plays_what_exists_so_far_and_says_how_far_it_is(live):
    node = opened_at_sampler(live)
    assert live.panels.count() == 0
    live.begin(node)
    live.panels.wait_for()
    assert live.panels.locator("canvas").is_hidden()
    live.add_chunk(node, 1)
    live.plays(1)
    assert live.panels.locator("canvas").get_attribute("aria-label") == "The video so far, 0.4 s"
    live.add_chunk(node, 2)
    live.plays(2)
    live.plays(1)  # and again from the beginning
    assert live.panels.locator(".numbers").inner_text() == "chunk 2 of 8 · 0.8 s · 5.3 frames/s · 12.0 s left"
    assert live.page.get_by_placeholder("What shall happen next").is_visible()
    live.begin(node, chunk=2, frames=6, seconds=0.75, status="ended", left=0.0)
    live.page.locator(".rkv-steering").wait_for(state="hidden")
    assert live.panels.locator(".numbers").inner_text() == "done · chunk 2 of 8 · 0.8 s"
    live.plays(2)
    live.begin(node, run="b" * 16)
    live.panels.locator("canvas").wait_for(state="hidden")
    live.add_chunk(node, 1, run="b" * 16)
    live.plays(1)  # the next run too, though the last one was playing when it began


def test_a_prompt_is_sent_as_it_is_to_come_and_the_answer_is_shown(live):
    node = opened_at_sampler(live)
    live.begin(node)
    prompt, how = live.page.get_by_label("What shall happen next"), live.page.get_by_label("How the prompt comes")
    answer = live.page.locator(".rkv-steering .answer")
    live.stage.answers["steer"] = lambda body: (200, told(node) | {"remark": "Unknown words: plaid."})
    prompt.fill("a plaid circle")
    prompt.press("Enter")
    answer.wait_for()
    assert answer.inner_text() == "From the next chunk on: a plaid circle Unknown words: plaid."
    assert prompt.input_value() == ""
    assert how.locator("option").all_inner_texts() == [
        "the model's own way",
        "hold",
        "recache",
        "cut",
        "blend",
        "slerp",
    ]
    how.select_option("blend")
    chunks = live.page.get_by_label("Chunks that the blend takes")
    chunks.fill("4")
    live.stage.answers["steer"] = lambda body: (200, told(node))
    prompt.fill("a blue square")
    prompt.press("Control+Enter")
    answer.get_by_text("From the next chunk on: a blue square").wait_for()
    how.select_option("cut")
    assert chunks.is_hidden()
    how.select_option("slerp")
    assert chunks.is_visible()
    prompt.fill("a blue circle")
    prompt.press("Enter")
    answer.get_by_text("From the next chunk on: a blue circle").wait_for()
    sent = [body for route, body in live.stage.posts if route == "steer"]
    common = {"run": "a" * 16, "action": "prompt"}
    assert sent == [
        common | {"prompt": "a plaid circle", "how": ""},
        common | {"prompt": "a blue square", "how": "blend 4"},
        common | {"prompt": "a blue circle", "how": "slerp 4"},
    ]


@ONE_RENDERER
def test_what_the_server_refuses_is_said_and_the_prompt_stays(live):
    node = opened_at_sampler(live)
    live.begin(node)
    live.stage.answers["steer"] = lambda body: (400, {"error": "The prompt has 300 tokens, more than 226."})
    prompt = live.page.get_by_label("What shall happen next")
    prompt.fill("too long")
    prompt.press("Enter")
    live.page.get_by_text("The prompt has 300 tokens, more than 226.").wait_for()
    assert prompt.input_value() == "too long"
    live.errors.clear()  # the browser itself logs every answer of 400
    live.begin(node, failure="The graphics card has no room for the text encoder.")
    live.page.get_by_text("The graphics card has no room for the text encoder.").wait_for()


def test_keys_typed_into_the_prompt_line_do_not_reach_the_canvas(live):
    node = opened_at_sampler(live)
    live.begin(node)
    prompt = live.page.get_by_label("What shall happen next")
    prompt.click()
    live.page.evaluate(f"id => window.app.canvas.selectNode(({NODE})(id))", node)
    before = live.page.evaluate("() => JSON.stringify(window.app.graph.serialize().nodes)")
    for key in (
        "a",
        " ",
        "b",
        "Delete",
        "Backspace",
        "Control+b",
        "Control+m",
        "Control+z",
        "Control+g",
        "q",
        "r",
        "w",
    ):
        prompt.press(key)
    assert live.page.evaluate("() => JSON.stringify(window.app.graph.serialize().nodes)") == before
    assert not [body for route, body in live.stage.posts if route == "steer"]
    prompt.press("Escape")
    assert live.page.evaluate("() => document.activeElement === document.body")


@ONE_RENDERER
def test_what_cannot_be_steered_says_why(live):
    node = opened_at_sampler(live)
    live.begin(node, steerable="The text encoder is not known here.", switches=[])
    prompt = live.page.get_by_label("What shall happen next")
    prompt.wait_for()
    assert prompt.is_disabled() and prompt.get_attribute("title") == "The text encoder is not known here."
    assert live.page.get_by_role("button", name="Stop here").is_enabled()


@ONE_RENDERER
def test_a_run_is_paused_resumed_stopped_and_copied(live):
    node = opened_at_sampler(live)
    live.begin(node)
    button = live.page.get_by_role("button", name="Pause")
    button.click()
    live.begin(node, status="paused")
    live.page.get_by_role("button", name="Resume").click()
    assert live.panels.locator(".numbers").inner_text().startswith("paused")
    live.begin(node)
    live.page.get_by_role("button", name="Copy as schedule").click()
    live.page.get_by_text("The schedule is in the clipboard.").last.wait_for()
    assert live.page.evaluate("() => navigator.clipboard.readText()") == "0: a red circle"
    live.page.get_by_role("button", name="Stop here").click()
    live.page.get_by_text("Ends with this chunk.").wait_for()
    assert button.is_disabled()
    assert [body["action"] for route, body in live.stage.posts if route == "steer"] == ["pause", "resume", "stop"]
    live.begin(node, status="ended", schedule="0: a red circle\n1: [end]")
    live.page.get_by_role("button", name="Stop here").wait_for(state="hidden")
    live.page.get_by_role("button", name="Copy as schedule").click()  # what was stopped is to be had when it has ended
    live.page.wait_for_function("async () => (await navigator.clipboard.readText()).endsWith('[end]')")


@ONE_RENDERER
def test_without_a_clipboard_the_schedule_is_copied_too(live):
    node = opened_at_sampler(live)
    live.begin(node, schedule="0: a / 2: b")
    live.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')) }")
    live.page.get_by_role("button", name="Copy as schedule").click()
    live.page.get_by_text("The schedule is in the clipboard.").last.wait_for()
    assert live.page.evaluate("() => navigator.clipboard.readText()") == "0: a / 2: b"
    live.page.evaluate("() => { delete navigator.clipboard.writeText }")


def test_it_comes_back_with_its_workflow_and_after_undo(live):
    node = opened_at_sampler(live)
    live.begin(node)
    live.add_chunk(node, 1)
    live.plays(1)
    first = live.workflow
    live.open("rolling_kv_stream")
    assert live.panels.count() == 0
    live.page.locator(".workflow-tab", has_text=T2V).last.click()
    live.plays(1)
    live.workflow = first
    live.plays(1)
    change = f"id => {{ const n = ({NODE})(id), w = n.widgets.find(w => w.name == 'seed'); "
    change += "window.app.canvas.emitBeforeChange(); w.value += 1; window.app.canvas.emitAfterChange() }"
    live.page.evaluate(change, node)
    live.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Undo')")
    live.page.wait_for_timeout(300)
    live.add_chunk(node, 2)
    live.plays(2)


@ONE_RENDERER
def test_after_a_reconnect_it_catches_up(live):
    node = opened_at_sampler(live)
    live.begin(node)
    live.add_chunk(node, 1)
    strips = [put_strip(live.stage, "a" * 16, chunk) for chunk in (1, 2, 3)]
    live.stage.runs = [told(node, workflow=live.workflow, chunk=3, seconds=9 / 8) | {"strips": strips}]
    live.stage.sockets[0].close()
    live.plays(3)
    assert live.panels.locator(".numbers").inner_text().startswith("chunk 3 of 8")


@ONE_RENDERER
def test_what_is_heard_while_the_list_of_runs_is_on_its_way_is_newer_than_the_list(live, monkeypatch):
    """The run ends meanwhile, of which no other event tells."""
    node = opened_at_sampler(live)
    live.begin(node, chunk=1)
    strips = [put_strip(live.stage, "a" * 16, chunk) for chunk in (1, 2)]
    live.stage.runs = [
        told(node, "e" * 16, workflow=live.workflow, status="ended") | {"strips": []},
        told(node, workflow=live.workflow, chunk=2) | {"strips": strips},
    ]
    asked, may, get = threading.Event(), threading.Event(), live.stage.get

    def slowly(path):
        if path.endswith("/rolling_kv/runs"):
            asked.set()
            may.wait(60)
        return get(path)

    monkeypatch.setattr(live.stage, "get", slowly)
    live.stage.sockets[0].close()
    until(live.page, asked.is_set)
    live.begin(node, chunk=3, status="ended")
    live.panels.get_by_text("done · chunk 3 of 8").wait_for()
    may.set()
    live.plays(2)
    assert live.panels.locator(".numbers").inner_text().startswith("done · chunk 3 of 8")


@ONE_RENDERER
def test_a_server_that_began_anew_has_no_run_and_is_told_the_settings(live):
    node = opened_at_sampler(live)
    live.begin(node, chunk=3)
    live.page.get_by_role("button", name="Pause").wait_for()
    live.stage.sockets[0].close()
    live.panels.get_by_text("cancelled · chunk 3 of 8").wait_for()
    assert live.page.locator(".rkv-steering").is_hidden()
    assert ("preview", {"on": True, "size": 256}) in live.stage.posts


@ONE_RENDERER
def test_a_strip_lasts_as_long_as_the_video_that_it_shows(live):
    """A picture for each latent frame, as there is without a VAE, is four frames of the video."""
    script = """async strips => {
      const { Player } = await import('/extensions/rolling-kv/player.js'), player = new Player(url => url)
      for (const strip of strips) player.append(strip)
      for (const strip of player.strips) strip.ready = true
      const shown = []
      for (let now = 0; now < 2000; now += 125) {
        player.step(now)
        cancelAnimationFrame(player.request)
        shown.push(player.canvas.dataset.frame)
      }
      return shown
    }"""
    strips = [
        put_strip(live.stage, "a" * 16, 1, frames=2) | {"seconds": 5 / 8},
        put_strip(live.stage, "a" * 16, 2, frames=2) | {"seconds": 1.0},
    ]
    shown = live.page.evaluate(script, strips)
    assert shown[:13] == [*["1:0"] * 3, *["1:1"] * 2, *["2:0"] * 4, *["2:1"] * 4] and shown[13:] == ["1:0"] * 3


@ONE_RENDERER
@pytest.mark.parametrize("status", [503, 404], ids=["a server that is busy", "a picture that is gone"])
def test_a_picture_that_did_not_come_is_asked_for_until_it_comes_or_is_gone(live, monkeypatch, status):
    node, get, asked = opened_at_sampler(live), live.stage.get, []
    run = str(status) * 5  # of which the browser has no pictures

    def failing(path):
        if path.endswith(f"{run}/chunks/2.webp"):  # pages of tests before may ask as well
            asked.append(path)
            if status == 404 or len(asked) <= 2:
                return status, "text/plain", b""
        return get(path)

    monkeypatch.setattr(live.stage, "get", failing)
    live.begin(node, run)
    for chunk in (1, 2, 3):
        live.add_chunk(node, chunk, run)
    live.plays(3)  # meanwhile the others are played
    live.plays(1)
    if status == 503:
        live.plays(2)
    else:
        live.page.wait_for_timeout(3500)
        assert len(asked) == 2
    live.errors.clear()  # the browser itself logs what did not come


@ONE_RENDERER
def test_videos_that_are_compared_no_more_are_let_go(live):
    live.open("rolling_kv_compare")
    script = """async () => {
      const node = window.app.graph.nodes.find(made => made.type === 'RollingKVCompareVideos')
      const film = { filename: 'gone.mp4', subfolder: '', type: 'temp', width: 64, height: 64, frames: 9, fps: 16 }
      const shown = () => [...node.widgets.find(widget => widget.name === 'compared').element.querySelectorAll('video')]
      node.onExecuted({ compared: [film, { ...film, filename: 'other.mp4' }] })
      const before = shown()
      node.onExecuted({ compared: [film, film] })
      return [before, shown()].map(videos => videos.map(video => video.hasAttribute('src')))
    }"""
    assert live.page.evaluate(script) == [[False, False], [True, True]]


@ONE_RENDERER
def test_several_samplers_play_their_own(live):
    one, other = live.open("rolling_kv_two_prompts")
    live.page.evaluate("() => { window.app.canvas.ds.scale = 0.5; window.app.canvas.setDirty(true, true) }")
    live.begin(one)
    live.begin(other, run="b" * 16)
    live.add_chunk(one, 1)
    live.add_chunk(other, 4, run="b" * 16)
    live.page.wait_for_function("() => document.querySelectorAll('.rkv-live').length == 2")
    for node, chunk in ((one, 1), (other, 4)):
        live.look_at(node)
        live.panels.first.wait_for()  # it is drawn with the next frame
        element = (
            f"id => ({NODE})(id).widgets.find(w => w.name == 'live').element.querySelector('canvas').dataset.frame"
        )
        live.page.wait_for_function(f"([id, chunk]) => ({element})(id)?.startsWith(chunk + ':')", arg=[node, chunk])


def test_inside_a_subgraph_it_plays_there_and_on_the_subgraphs_node(live):
    node = opened_at_sampler(live)
    pack = f"id => String(window.app.graph.convertToSubgraph(new Set([({NODE})(id)])).node.id)"
    outer = live.page.evaluate(pack, node)
    inner = live.page.evaluate(f"id => String(({NODE})(id).subgraph.nodes[0].id)", outer)
    run = f"{outer}:{inner}"
    live.look_at(outer)
    live.begin(run)
    live.add_chunk(run, 1)
    live.plays(1)
    live.page.evaluate(f"id => window.app.canvas.setGraph(({NODE})(id).subgraph)", outer)
    live.page.evaluate(
        "() => { window.app.canvas.ds.scale = 1; window.app.canvas.centerOnNode(window.app.canvas.graph.nodes[0]) }"
    )
    live.add_chunk(run, 2)
    live.plays(2)
    live.page.evaluate("() => window.app.canvas.setGraph(window.app.graph)")


@ONE_RENDERER
def test_another_open_workflow_with_a_node_of_that_number_does_not_play_it(live):
    node = opened_at_sampler(live)
    live.begin(node, workflow="00000000-0000-4000-8000-000000000000")
    live.page.wait_for_timeout(300)
    assert live.panels.count() == 0
    live.begin(node)
    live.panels.wait_for()
    live.begin(node, run="b" * 16, workflow=None, chunk=5)  # of a script: whoever has such a node shows it
    live.panels.get_by_text("chunk 5 of 8").wait_for()
    # Of an API prompt that was opened in a page: it gets an id only when it is opened again.
    live.begin(node, run="c" * 16, workflow="00000000-0000-0000-0000-000000000000", chunk=6)
    live.panels.get_by_text("chunk 6 of 8").wait_for()


def preview_event(node: str, picture: bytes) -> bytes:
    """ComfyUI's own picture of a node that runs, as its websocket sends it."""
    about = {"node_id": node, "display_node_id": node, "real_node_id": node, "parent_node_id": None, "prompt_id": "1",
             "image_type": "image/webp"}  # fmt: skip
    metadata = json.dumps(about).encode()
    return struct.pack(">II", 4, len(metadata)) + metadata + picture


@pytest.mark.parametrize("plays", [True, False], ids=["beside ours", "alone"])
def test_comfyuis_own_picture_is_shown_only_where_ours_is_not(live, plays):
    node = opened_at_sampler(live)
    live.begin(node)
    running = dict.fromkeys(("node_id", "display_node_id", "real_node_id"), node) | {
        "state": "running",
        "value": 0,
        "max": 4,
    }
    live.stage.send(
        "progress_state", {"prompt_id": uuid4().hex, "nodes": {node: running}}
    )  # takes away earlier pictures
    if plays:
        live.add_chunk(node, 1)
        live.plays(1)
    strip = put_strip(live.stage, "c" * 16, 1)
    shown = f"id => ({NODE})(id).imgs?.length || document.querySelectorAll(`[data-node-id='${{id}}'] img`).length"

    def arrives() -> bool:
        for socket in live.stage.sockets:
            socket.send(preview_event(node, live.stage.strips["c" * 16, 1]))
        live.page.wait_for_timeout(500)
        return bool(live.page.evaluate(shown, node))

    if plays:
        assert not arrives()
    else:
        until(live.page, arrives)  # a server sends one with each step
    assert strip["frames"] == 3


@ONE_RENDERER
def test_what_is_held_is_bounded_and_the_last_part_goes_on(live):
    node = opened_at_sampler(live)
    live.begin(node)
    for chunk in (1, 2, 3):
        large = put_strip(live.stage, "a" * 16, chunk) | {"frames": 3 * 2**20, "width": 4, "height": 4}
        live.stage.send("rolling_kv.chunk", told(node, workflow=live.workflow, chunk=chunk) | {"strip": large})
        live.page.wait_for_timeout(200)
    held = f"id => ({NODE})(id).widgets.find(w => w.name == 'live').element.querySelector('canvas').dataset.frame"
    live.page.wait_for_function(f"id => /^[23]:/.test(({held})(id))", arg=node)


@ONE_RENDERER
def test_nothing_is_played_while_nobody_can_see_it(live):
    node = opened_at_sampler(live)
    live.begin(node)
    live.add_chunk(node, 1)
    live.plays(1)
    frame = f"id => ({NODE})(id).widgets.find(w => w.name == 'live').element.querySelector('canvas').dataset.frame"
    live.page.evaluate("() => { window.app.canvas.ds.offset[0] -= 5000; window.app.canvas.setDirty(true, true) }")

    def still():
        seen = []
        for _ in range(8):
            live.page.wait_for_timeout(100)
            seen.append(live.page.evaluate(frame, node))
        return len(set(seen)) == 1

    until(live.page, still)
    seen = live.page.evaluate(frame, node)
    live.page.wait_for_timeout(700)
    assert live.page.evaluate(frame, node) == seen
    live.look_at(node)
    live.page.wait_for_function(f"([id, seen]) => ({frame})(id) != seen", arg=[node, seen])


@ONE_RENDERER
def test_settings_are_told_to_the_server_and_texts_follow_the_language(live):
    node = opened_at_sampler(live)
    live.set("RollingKV.Live.Size", 384)
    live.set("RollingKV.Live.Preview", False)
    until(live.page, lambda: [route for route, _ in live.stage.posts].count("preview") > 1)
    assert [body for route, body in live.stage.posts if route == "preview"] == [
        {"on": True, "size": 384},
        {"on": False, "size": 384},
    ]
    live.set("RollingKV.Live.Size", 256)
    live.set("RollingKV.Live.Preview", True)
    live.set("Comfy.Locale", "zh")
    try:
        live.begin(node, chunk=2, seconds=0.75)
        live.panels.get_by_text("第 2 / 8 块").wait_for()
        assert live.panels.locator(".numbers").inner_text() == "第 2 / 8 块 · 0.8 秒"
    finally:
        live.set("Comfy.Locale", "en")


def test_colours_of_strips_differ():
    assert len({colour(chunk, frame) for chunk in range(1, 5) for frame in range(3)}) == 12
