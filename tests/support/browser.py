"""The real frontend in a headless Chromium: open a workflow file, see what the page reports, press Run."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

SMALL = {"width": 1280, "height": 800}

ERROR_OVERLAY = "[data-testid='error-overlay']"
RUN_BUTTON = "[data-testid='queue-button']"

SET = "([id, value]) => window.app.extensionManager.setting.set(id, value)"
IN_VUE = "Comfy.VueNodes.Enabled"

SET_WIDGET = """([type, name, value]) => {
  for (const node of window.app.graph.nodes.filter(node => node.type === type))
    node.widgets.find(widget => widget.name === name).value = value
}"""

RECORD_RUN = """() => {
  window.finishedRun = null
  const api = window.comfyAPI.api.api
  for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    api.addEventListener(kind, ({ detail }) => { window.finishedRun = { kind, ...detail } })
}"""

OPEN_FILE = """async ([name, text]) => {
  await window.app.handleFile(new File([text], name, { type: 'application/json' }))
}"""

LIST_NODES = """() => {
  const graphs = [window.app.graph, ...(window.app.graph.subgraphs?.values() ?? [])]
  return graphs.flatMap(graph => graph.nodes).map(({ id, type, title, mode, size }) =>
    ({ id, type, title, mode, size: [...size], known: type in LiteGraph.registered_node_types
       || ['Note', 'MarkdownNote', 'Reroute', 'PrimitiveNode'].includes(type) }))
}"""

RECTANGLES = """() => {
  const { scale, offset } = window.app.canvas.ds
  return window.app.graph.nodes.map(node => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    const [left, top, width, height] = drawn
      ? [drawn.x / scale - offset[0], drawn.y / scale - offset[1], drawn.width / scale, drawn.height / scale]
      : [node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, node.size[0], node.size[1] + LiteGraph.NODE_TITLE_HEIGHT]
    return { type: node.type, left, top, right: left + width, bottom: top + height }
  })
}"""


def find_chromium() -> str | None:
    """The path of a Chromium: $CHROMIUM_PATH, else the first known name on PATH; None without one."""
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def until(page, condition):
    """Let a page go on until a condition holds; returns what the condition gives then."""
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        page.wait_for_timeout(50)
    return found


@contextmanager
def fresh_page(chromium, client, in_vue: bool):
    """The frontend of a server in a fresh browser profile."""
    client.post(f"/settings/{IN_VUE}", in_vue)
    context = new_context(chromium)
    try:
        yield Frontend(context.new_page(), client)
    finally:
        context.close()


def new_context(chromium, **options):
    """A browser profile of its own. Whatever is waited for may take long on a machine that has other things to do."""
    context = chromium.new_context(**{"viewport": {"width": 1600, "height": 1000}} | options)
    context.set_default_timeout(120_000)
    return context


class Pages:
    """The frontend of each server in a page that stays open from test to test, as it does for people: it takes long to load.

    A small window: without a GPU each of its pixels costs time while nodes run.
    """

    def __init__(self, chromium):
        self.chromium, self.kept = chromium, {}

    def of(self, client, in_vue: bool) -> Frontend:
        """The page of a server, with that way to draw nodes; a fresh one where a test has left it with complaints."""
        page = self.kept.get(client.url)
        if page and page.complaints():
            page.page.context.close()
            page = None
        self.kept[client.url] = page = page or Frontend(new_context(self.chromium, viewport=SMALL).new_page(), client)
        page.set(IN_VUE, in_vue)
        return page

    def close(self) -> None:
        """A page that is left open goes on: it plays what it shows, and asks the server for its history after every prompt."""
        for page in self.kept.values():
            page.page.context.close()


class Frontend:
    """ComfyUI's page. `messages` collects what the console reports: (kind, text, address of the script)."""

    def __init__(self, page, client):
        self.page = page
        self.client = client
        self.messages: list[tuple[str, str, str]] = []
        page.on("console", lambda m: self.messages.append((m.type, m.text, m.location.get("url", ""))))
        page.on("pageerror", lambda error: self.messages.append(("pageerror", error.message, error.stack or "")))
        page.goto(client.url)
        page.wait_for_function("() => window.app?.vueAppReady && window.app.graph?.nodes.length")
        page.evaluate(RECORD_RUN)

    def set(self, setting: str, value) -> None:
        self.page.evaluate(SET, [setting, value])

    def set_widget(self, node_type: str, name: str, value) -> None:
        """Choose a value on all nodes of a type."""
        self.page.evaluate(SET_WIDGET, [node_type, name, value])

    def refresh(self) -> None:
        """Ask the server anew what there is, as the key R does."""
        self.page.evaluate("() => window.app.refreshComboInNodes()")

    def open_workflow(self, path: Path) -> list[dict]:
        """Open a workflow file as a drop on the canvas does, and return its nodes.

        A node is a dict of id, type, title, mode, size, and known: whether the page has such a node.
        """
        path = Path(path)
        self.messages.clear()
        self.page.evaluate(OPEN_FILE, [path.name, path.read_text(encoding="utf-8")])
        self.page.wait_for_timeout(1500)  # the checks for missing nodes and models run after the graph is shown
        return self.page.evaluate(LIST_NODES)

    def rectangles(self) -> list[dict]:
        """Where the nodes are on the canvas, titles included: dicts of type, left, top, right, bottom."""
        return self.page.evaluate(RECTANGLES)

    def complaints(self) -> str:
        """What the page's own error panel says: missing nodes or models, a refused prompt; "" when closed."""
        overlay = self.page.locator(ERROR_OVERLAY)
        return overlay.inner_text() if overlay.is_visible() else ""

    def errors_from(self, *words: str) -> list[str]:
        """Console errors and warnings since the workflow was opened with one of `words` in text or address."""
        return [
            f"{kind}: {text} ({script})"
            for kind, text, script in self.messages
            if kind in ("error", "warning", "pageerror") and any(word in text + script for word in words)
        ]

    def press_run(self, seconds: float = 300) -> dict:
        """Click the Run button, wait for the end of the run, and return its outputs by node id.

        Raises AssertionError with the page's words when the prompt is refused or a node fails.
        """
        self.page.evaluate("() => { window.finishedRun = null }")
        self.page.locator(RUN_BUTTON).click()
        finished_or_refused = f'() => window.finishedRun || document.querySelector("{ERROR_OVERLAY}")'
        self.page.wait_for_function(finished_or_refused, timeout=seconds * 1000)
        finished = self.page.evaluate("() => window.finishedRun")
        assert finished and finished["kind"] == "execution_success", f"{finished} {self.complaints()}"
        return self.client.outputs(finished["prompt_id"])

    def screenshot(self, path: Path) -> Path:
        self.page.screenshot(path=path)
        return path
