"""Takes the pictures in web/docs, which README and help pages show: `python -m tools.generate.screenshots [NAME …]`, with a ComfyUI and a Chromium."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ..comfyui.env import PACK, ComfyError, find_install, install_missing
from ..comfyui.server import ComfyServer

IMAGES = PACK / "web" / "docs"
VIEW = {"width": 1500, "height": 1500}
SETTINGS = {"Comfy.TutorialCompleted": "true", "Comfy.VueNodes.Enabled": "true", "Comfy.Minimap.Visible": "false"}
PACE = 8
"""Frames of an animation per second."""

OPEN = """async ([name, text]) => {
  await window.app.handleFile(new File([text], name, { type: 'application/json' }))
}"""
LOOK = """type => {
  const node = window.app.graph.nodes.find(node => node.type === type), { ds } = window.app.canvas
  ds.scale = 1.25
  ds.offset = [120 / ds.scale - node.pos[0], 130 / ds.scale - node.pos[1]]
  window.app.canvas.setDirty(true, true)
  return String(node.id)
}"""
"""Brings a node to the upper left, and returns its id."""
CHANGE = """([type, name, value]) => {
  window.app.graph.nodes.find(node => node.type === type).widgets.find(widget => widget.name === name).value = value
}"""
CHUNK = "() => Number(document.querySelector('.rkv-live .numbers').textContent.match(/\\d+/)[0])"
"""How many chunks are made."""
MADE = "chunk => Number(document.querySelector('.rkv-live canvas')?.dataset.frame?.split(':')[0] ?? 0) >= chunk"


def open_workflow(page: Page, name: str) -> None:
    path = PACK / "workflows" / f"{name}.json"
    page.evaluate(OPEN, [path.name, path.read_text(encoding="utf-8")])
    page.wait_for_timeout(1500)


def picture(page: Page, number: str) -> Image.Image:
    """The node of that id, with a little of what is around it."""
    box = page.locator(f"[data-node-id='{number}']").bounding_box()
    assert box is not None
    clip = {"x": box["x"] - 12, "y": box["y"] - 12, "width": box["width"] + 24, "height": box["height"] + 24}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def animate(frames: list[Image.Image], path) -> None:
    """Write an animation whose frames are as large as the largest, and whose last one stays for two seconds."""
    width, height = (max(frame.size[side] for frame in frames) for side in (0, 1))
    even = []
    for frame in frames:
        sheet = Image.new("RGB", (width, height), frame.getpixel((2, 2)))
        sheet.paste(frame, (0, 0))
        even.append(sheet)
    shown = [1000 // PACE] * (len(even) - 1) + [2000]
    even[0].save(path, "WEBP", save_all=True, append_images=even[1:], duration=shown, loop=0, quality=70, method=6)


def live(page: Page) -> None:
    """A video that grows on Stream Video, and is told to change its colour: live.png, and live.webp that moves."""
    open_workflow(page, "rolling_kv_stream")
    page.evaluate(CHANGE, ["RollingKVPromptSchedule", "text", "a red circle moving right"])
    page.evaluate(CHANGE, ["RollingKVStreamVideo", "seconds", 0])
    number = page.evaluate(LOOK, "RollingKVStreamVideo")
    page.locator("[data-testid='queue-button']").click()
    page.wait_for_function(MADE, arg=2, timeout=120_000)
    frames = []

    def film(seconds: float, chunk: int = 0) -> None:
        """So long, and for at most half a minute more until that chunk is played."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until or (now < until + 30 and not page.evaluate(MADE, chunk)):
            began = time.monotonic()
            frames.append(picture(page, number))
            page.wait_for_timeout(max(1000 / PACE - 1000 * (time.monotonic() - began), 1))

    prompt = page.locator(".rkv-steering .prompt")
    film(1.5)
    for word in ("a ", "blue ", "square ", "moving ", "left"):
        prompt.press_sequentially(word)
        frames.append(picture(page, number))
    page.locator(".rkv-steering select").select_option("cut")  # so that it is seen at once
    prompt.press("Enter")
    page.locator(".rkv-steering .answer").wait_for()
    film(3, chunk=page.evaluate(CHUNK) + 2)
    frames.append(picture(page, number))
    frames[-1].save(IMAGES / "live.png", optimize=True)
    page.get_by_role("button", name="Stop here").click()
    animate(frames, IMAGES / "live.webp")


def compare(page: Page) -> None:
    """Two seeds of one prompt with the wipe between them: RollingKVCompareVideos/compare.png."""
    open_workflow(page, "rolling_kv_compare")
    number = page.evaluate(LOOK, "RollingKVCompareVideos")
    page.locator("[data-testid='queue-button']").click()
    frame = page.get_by_role("slider", name="Frame")
    frame.wait_for(timeout=300_000)
    page.get_by_role("button", name="Pause", exact=True).click()
    frame.fill("20")
    page.wait_for_timeout(1000)  # until both show it
    picture(page, number).save(IMAGES / "RollingKVCompareVideos" / "compare.png", optimize=True)


SHOTS = {"live": live, "compare": compare}


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """ComfyUI's page in a browser."""
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=VIEW)
        for setting, value in SETTINGS.items():
            page.request.post(f"{url}/settings/{setting}", data=value, headers={"Content-Type": "application/json"})
        page.goto(url, timeout=240_000)
        page.wait_for_function("() => window.app?.vueAppReady && window.app.graph?.nodes.length", timeout=120_000)
        yield page
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.generate.screenshots", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SHOTS))
    names = parser.parse_args().names or list(SHOTS)
    install = find_install()
    if install is None:
        raise ComfyError("No ComfyUI was found: set COMFYUI_PATH to its folder.")
    install_missing(install)
    with ComfyServer(install) as server:
        for name in names:
            with opened(server.client.url) as page:
                SHOTS[name](page)


if __name__ == "__main__":
    main()
