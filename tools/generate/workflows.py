"""The example workflows, built in the real frontend from their descriptions.

The frontend itself lays the values out, saves the graph and exports the API prompt, so both are what a user would get.
Thumbnails are screenshots of the graph.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ..comfyui.client import ComfyClient, load_prompt
from ..comfyui.env import PACK
from .examples import WORKFLOWS
from .files import as_json, write

WIDTH, GAP, TITLE = 340, 40, 30
ROOM = {
    "RollingKVLoadModel": 356, "RollingKVLoadTextEncoder": 136, "RollingKVLoadVAE": 136, "RollingKVEncodePrompt": 140, "RollingKVPromptSchedule": 520,
    "RollingKVAttachCache": 440, "RollingKVLoadLoRA": 136, "RollingKVStepCache": 292, "RollingKVSample": 830, "RollingKVEncodeVideo": 300, "RollingKVStreamVideo": 910, "RollingKVSaveState": 130, "RollingKVLoadState": 190, "RollingKVInspectState": 520, "RollingKVDecodeImages": 80, "ImageScaleBy": 130, "CreateVideo": 130,
    "RollingKVDecodeVideo": 200, "RollingKVBenchmark": 556, "RollingKVCompareVideos": 620, "SaveVideo": 148, "LoadImage": 340,
}  # fmt: skip
"""Heights of the nodes where they are largest: in Nodes 2.0, with advanced inputs shown, and while they play what they make."""


def layout(description: dict) -> dict:
    """The nodes and notes of a workflow with their places: nodes in columns, notes below them all, off the links."""
    places, bottom = {}, 0
    for column, names in enumerate(description["columns"]):
        y = 60
        for name in names.split():
            places[name] = (_left(column), y)
            y += ROOM[description["nodes"][name][0]] + GAP + TITLE
        bottom = max(bottom, y)
    sizes = description.get("sizes", {})
    nodes = {
        name: (kind, places[name], values, sizes.get(name), [file._asdict() for file in itertools.chain(*files)])
        for name, (kind, values, *files) in description["nodes"].items()
    }
    notes = [((_left(column), bottom), size, text) for column, size, text in description["notes"]]
    return {"nodes": nodes, "notes": notes}


def _left(column: int) -> int:
    return 40 + column * (WIDTH + GAP)


BUILD = """({ nodes, notes }) => {
  const graph = window.app.graph
  graph.clear()
  const made = {}
  for (const [name, [type, pos, values, size, models]] of Object.entries(nodes)) {
    const node = LiteGraph.createNode(type)
    if (!node) throw new Error(`no node ${type}`)
    graph.add(node)
    node.pos = [...pos]
    made[name] = node
    if (models.length) node.properties.models = models
    for (const [input, value] of Object.entries(values)) {
      const widget = node.widgets?.find(w => w.name === input)
      const source = typeof value === 'string' && value.match(/^([a-z_]+)\\.(\\d+)$/)
      if (source && made[source[1]])
        made[source[1]].connect(Number(source[2]), node, node.inputs.findIndex(i => i.name === input))
      else if (widget) widget.value = value
      else throw new Error(`${type} has no input ${input}`)
    }
    for (const widget of node.widgets ?? [])
      if (widget.name === 'control_after_generate') widget.value = 'fixed'
    node.setSize(size ?? [340, node.computeSize()[1]])
  }
  for (const [pos, size, text] of notes) {
    const note = LiteGraph.createNode('MarkdownNote')
    graph.add(note)
    note.pos = [...pos]
    note.size = [...size]
    note.widgets[0].value = text
  }
}"""
EXPORT = """async () => {
  const { output } = await window.app.graphToPrompt()
  return { workflow: window.app.graph.serialize(), prompt: output }
}"""
FRAME = """async () => {
  await window.app.extensionManager.setting.set('Comfy.Minimap.Visible', false)
  const nodes = window.app.graph.nodes
  const left = Math.min(...nodes.map(n => n.pos[0])) - 20, top = Math.min(...nodes.map(n => n.pos[1])) - 60
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 20
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 20
  const view = window.app.canvas.ds, [x, y, width, height] = [70, 90, innerWidth - 90, innerHeight - 110]
  view.scale = Math.min(width / (right - left), height / (bottom - top), 1)
  view.offset = [x / view.scale - left, y / view.scale - top]
  window.app.canvas.setDirty(true, true)
  return { x, y, width: (right - left) * view.scale, height: (bottom - top) * view.scale }
}"""
"""Brings the whole graph into view and returns its rectangle on the page."""
JSON = {"Content-Type": "application/json"}
SETTINGS = {
    "Comfy.TutorialCompleted": "true",  # else a first visit opens the template browser over the graph
    "Comfy.VueNodes.Enabled": "false",  # in Nodes 2.0 nodes are larger
    "LiteGraph.Canvas.MinFontSizeForLOD": "0",  # else a wide graph has no words
}


def write_stand_ins(folder: Path) -> None:
    """Put empty files where a server looks for those that do not ship: their names are all that a page asks for."""
    for description in WORKFLOWS.values():
        for _, _, *files in description["nodes"].values():
            for file in itertools.chain(*files):
                (folder / file.directory / file.name).touch()


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """A page of a browser, which has not gone to the server at `url` yet."""
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1920, "height": 1000})
        page.set_default_timeout(120_000)
        for setting, value in SETTINGS.items():
            page.request.post(f"{url}/settings/{setting}", data=value, headers=JSON)
        yield page
        browser.close()


def build(page: Page, url: str, description: dict) -> None:
    """Open the frontend, and put the nodes and notes of a workflow on its canvas."""
    page.goto(url)  # anew: the page remembers pictures by node number
    page.wait_for_function("() => window.app?.vueAppReady && window.app.graph", timeout=120_000)
    page.wait_for_timeout(3000)  # the page then loads its last graph, or the default one
    page.evaluate(BUILD, layout(description))


def generate(url: str, names: list[str]) -> None:
    with opened(url) as page:
        for name in names:
            description = WORKFLOWS[name]
            if "after" in description:
                ComfyClient(url).run(load_prompt(api_prompt(description["after"])))
            build(page, url, description)
            saved = page.evaluate(EXPORT)
            write(api_prompt(name), as_json(saved["prompt"]))
            if description.get("api_only"):
                continue
            picture = PACK / "workflows" / f"{name}.jpg"
            if write(PACK / "workflows" / f"{name}.json", as_json(saved["workflow"])) or not picture.exists():
                rectangle = page.evaluate(FRAME)
                page.wait_for_timeout(1000)
                save_thumbnail(page.screenshot(clip=rectangle), picture)


def api_prompt(name: str) -> Path:
    """The file of an example's API prompt."""
    return PACK / "workflows" / "api" / f"{name.removeprefix('rolling_kv_')}.json"


def save_thumbnail(png: bytes, path: Path) -> None:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((1024, 1024))
    picture.save(path, quality=85)
