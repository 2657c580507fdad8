"""The pictures of the help pages: parts of nodes in the real frontend, as the bundled model has them."""

from __future__ import annotations

import io

from PIL import Image

from ..comfyui.env import PACK
from . import workflows

FOLDER = PACK / "web" / "docs"
SCHEDULE = """0: a red circle moving right
2.8125: a blue circle moving right [recache]
5.8125: a green square moving left [cut]
8.0625: a blue square moving left [blend 3]
10.3125: [end]"""
MODEL = {
    "model": ("RollingKVLoadModel", {"model_name": "tiny (bundled)"}),
    "cache": ("RollingKVAttachCache", {"model": "model.0", "window": "this many frames", "sink": "this many frames"}),
}
PICTURES = {
    "RollingKVPromptSchedule/timeline.png": (
        {**MODEL, "schedule": ("RollingKVPromptSchedule", {"model": "cache.0", "text": SCHEDULE})}, "schedule", ".rkv-timeline",
    ),
    "RollingKVAttachCache/window.png": (
        {**MODEL, "sample": ("RollingKVSample", {"model": "cache.0", "length": 20})}, "cache", ".rkv-window",
    ),
}  # fmt: skip
"""By file: the nodes of a graph, as `workflows.WORKFLOWS` has them, the node that is shown, and the part of it."""
WIDE = """id => {
  const node = window.app.graph.nodes.find(made => made.type === id)
  node.pos = [node.pos[0], node.pos[1] + 5000] // so wide, it would lie upon its neighbour
  node.setSize([560, node.size[1]])
  window.app.canvas.ds.scale = 1
  window.app.canvas.ds.offset = [120 - node.pos[0], 120 - node.pos[1]]
  window.app.canvas.setDirty(true, true)
}"""
AROUND = 8
"""Pixels around what is shown."""


def generate(url: str) -> None:
    """Make them anew with the server at `url`."""
    with workflows.opened(url) as page:
        for name, (nodes, shown, part) in PICTURES.items():
            workflows.build(page, url, {"nodes": nodes, "columns": list(nodes), "notes": []})
            page.evaluate(WIDE, nodes[shown][0])
            page.locator(part).locator(".said").get_by_text(".", exact=False).first.wait_for()
            page.wait_for_timeout(1000)
            box = page.locator(part).bounding_box()
            clip = {
                "x": box["x"] - AROUND,
                "y": box["y"] - AROUND,
                "width": box["width"] + 2 * AROUND,
                "height": box["height"] + 2 * AROUND,
            }
            picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("P", palette=Image.Palette.ADAPTIVE)
            picture.save(FOLDER / name, optimize=True)
            print(f"web/docs/{name}")
