"""The page with a run on it, as tests and pictures need it: what a server tells of a run, and what the page makes of that."""

from __future__ import annotations

import io
import json
import re
import uuid

from browser import OPEN_FILE, SET, until
from PIL import Image

from tools.comfyui.env import PACK

RENDERERS = {"classic": False, "nodes-2": True}

READY = "() => window.app?.vueAppReady && window.app.graph?.nodes.length"

NODE = "id => window.app.graph.getNodeById(id) ?? window.app.graph.getNodeById(Number(id))"

CENTRE = f"""id => {{
  const {{ canvas }} = window.app
  const node = ({NODE})(id)
  canvas.ds.scale = Math.min(1, 0.85 * canvas.canvas.clientHeight / node.size[1])
  canvas.centerOnNode(node)
  canvas.setDirty(true, true)
}}"""

SHOWN = """canvas => {
  const { data } = canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height / 2, 1, 1)
  return [canvas.dataset.frame, [...data.slice(0, 3)]]
}"""


def told(node: str, run: str = "a" * 16, **changed) -> dict:
    """What a server tells of a run, without its strips."""
    return {
        "run": run, "prompt_id": "1", "node": node, "display_node": node, "workflow": None, "status": "running", "steerable": "",
        "switches": ["", "hold", "recache", "cut"], "chunk": 0, "chunks": 8, "first_seconds": 0.0, "fps": 8.0, "frames": 0,
        "seconds": 0.0, "rate": 0.0, "left": None, "schedule": "0: a red circle", "window": None, "size": [416, 240],
    } | changed  # fmt: skip


def colour(chunk: int, frame: int) -> tuple[int, int, int]:
    """Of a frame of the strips here: each has its own."""
    return (50 * chunk % 256, 80 * frame % 256, 128)


def put_strip(stage, run: str, chunk: int, frames: int = 3, columns: int = 2, size=(96, 56)) -> dict:
    """Let a stage have a strip, and return what a server tells of it."""
    width, height = size
    sheet = Image.new("RGB", (width * columns, height * -(-frames // columns)))
    for index in range(frames):
        place = index % columns * width, index // columns * height
        sheet.paste(Image.new("RGB", size, colour(chunk, index)), place)
    file = io.BytesIO()
    sheet.save(file, "WEBP", lossless=True)
    stage.strips[run, chunk] = file.getvalue()
    url = f"/rolling_kv/runs/{run}/chunks/{chunk}.webp"
    shape = {"frames": frames, "width": width, "height": height, "columns": columns}
    return {"chunk": chunk, "url": url, "seconds": frames / 8, **shape}


class LivePage:
    """A page of a stage, and what a test looks at in it. `errors`: what its console said that speaks of the pack."""

    def __init__(self, page, stage):
        self.page, self.stage = page, stage
        self.errors: list[str] = []
        page.on("console", lambda m: self._heard(m.type, m.text, m.location.get("url", "")))
        page.on("pageerror", lambda error: self._heard("error", error.message, error.stack or ""))
        stage.watch(page)
        page.goto(stage.url)
        page.wait_for_function(READY)

    def _heard(self, kind, text, script):
        if kind in ("error", "warning") and re.search(r"rolling[-_]?kv", text + script, re.IGNORECASE):
            self.errors.append(f"{kind}: {text} ({script})")

    def set(self, setting: str, value) -> None:
        self.page.evaluate(SET, [setting, value])

    def open(self, workflow: str) -> list[str]:
        """Open an example workflow; returns the ids of its samplers, in the order of the file."""
        path = PACK / "workflows" / f"{workflow}.json"
        self.workflow = str(uuid.uuid4())  # another one each time, so that no earlier run belongs to it
        text = json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"id": self.workflow})
        self.page.evaluate(OPEN_FILE, [path.name, text])
        samplers = "() => window.app.graph.nodes.filter(n => /KV(Sample|Stream)/.test(n.type)).map(n => String(n.id))"
        return self.page.evaluate(samplers)

    def look_at(self, node: str) -> None:
        self.page.evaluate(CENTRE, node)

    def begin(self, node: str, run: str = "a" * 16, **changed) -> None:
        self.stage.send("rolling_kv.run", told(node, run, **{"workflow": self.workflow} | changed))

    def add_chunk(self, node: str, chunk: int, run: str = "a" * 16, **changed) -> None:
        strip = put_strip(self.stage, run, chunk)
        made = {"chunk": chunk, "frames": 3 * chunk, "seconds": 3 * chunk / 8, "rate": 5.25, "left": 12.0}
        made["workflow"] = self.workflow
        self.stage.send("rolling_kv.chunk", told(node, run, **made | changed) | {"strip": strip})

    @property
    def panels(self):
        return self.page.locator(".rkv-live:visible")

    def plays(self, chunk: int, panel: int = 0) -> None:
        """Wait until a frame of the chunk is shown, and compare every frame that is seen meanwhile with its colour."""
        canvas = self.panels.nth(panel).locator("canvas")

        def played():
            shown, pixel = canvas.evaluate(SHOWN)
            number, frame = (0, 0) if shown is None else map(int, shown.split(":"))
            assert shown is None or tuple(pixel) == colour(number, frame), shown
            return number == chunk

        until(self.page, played)
