"""Build workflows/ and workflows/api/ in the real frontend, from the short descriptions below.

Run it after a node has changed:  python -m tools.workflows [URL of a ComfyUI that has the pack [NAME…]]
The frontend itself lays the values out, saves the graph and exports the API prompt, so both are what a user would get.
Thumbnails are screenshots of the graph.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PACK = Path(__file__).resolve().parent.parent
TINY = "tiny (bundled)"
CIRCLE, SQUARE = "a red circle moving right", "a blue circle moving right"

LOADERS = {
    "model": ("RollingKVLoadModel", (40, 60), {"model_name": TINY}),
    "text_encoder": ("RollingKVLoadTextEncoder", (40, 280), {"text_encoder_name": TINY}),
    "vae": ("RollingKVLoadVAE", (780, 440), {"vae_name": TINY}),
    "cache": ("RollingKVAttachCache", (400, 60), {"model": "model.0"}),
}


def real_model(first: str, model: str, then: str) -> str:
    """Note on the files of a real model. first: a sentence in front; model: which transformer; then: what to set."""
    return f"""## With a real model
{first}Put into ComfyUI's model folders, choose them in the three loaders, press R first if they do not show:
- `models/diffusion_models`: {model}
- `models/text_encoders`: [umt5_xxl_fp8_e4m3fn_scaled.safetensors](https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors)
- `models/vae`: [wan_2.1_vae.safetensors](https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors)

{then}"""


def multi_step_model(then: str) -> str:
    return real_model(
        "Step caches help models that sample in many steps. ",
        "[ar_diffusion.pt](https://huggingface.co/zhuhz22/Causal-Forcing/resolve/main/chunkwise/ar_diffusion.pt) of "
        "Causal-Forcing, or another causal Wan model that is not distilled",
        then,
    )


REAL_MODELS = real_model(
    "",
    "[self_forcing_dmd.pt](https://huggingface.co/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt) or "
    "another causal Wan model",
    "Then set the size to 832 x 480 and **enlarge** in Decode Video to 1.",
)


def prompt(text: str, y: int) -> tuple:
    return "RollingKVEncodePrompt", (400, y), {"text_encoder": "text_encoder.0", "text": text}


def sample(x: int, y: int, positive: str, length: float, seed: int, **inputs: str) -> tuple:
    values = {"model": "cache.0", "positive": positive, "length": length, "length_unit": "seconds", "seed": seed}
    return "RollingKVSample", (x, y), values | {"width": 64, "height": 64} | inputs


def output(x: int, latent: str, name: str) -> dict:
    return {
        "decode": ("RollingKVDecodeVideo", (x, 60), {"vae": "vae.0", "latent": latent, "fps": 16, "enlarge": 6}),
        "save": ("SaveVideo", (x + 380, 60), {"video": "decode.0", "filename_prefix": f"video/{name}"}),
    }


WORKFLOWS = {
    "rolling_kv_text_to_video": {
        "nodes": LOADERS
        | {"prompt": prompt(CIRCLE, 280), "sample": sample(780, 60, "prompt.0", 5.0, 1)}
        | output(1160, "sample.0", "rolling_kv_t2v"),
        "notes": [
            (
                (40, 460),
                (340, 190),
                "## Text to video\nThe model writes the video chunk by chunk; each chunk sees the "
                "frames before it through the rolling cache. **length** may be as long as you like: memory stays the same.",
            ),
            ((1160, 460), (720, 190), REAL_MODELS),
        ],
    },
    "rolling_kv_image_to_video": {
        "nodes": LOADERS
        | {
            "vae": ("RollingKVLoadVAE", (40, 440), {"vae_name": TINY}),
            "prompt": prompt(CIRCLE, 280),
            "image": ("LoadImage", (40, 600), {"image": "example.png"}),
            "encode": (
                "RollingKVEncodeVideo",
                (400, 600),
                {
                    "vae": "vae.0",
                    "images": "image.0",
                    "width": 64,
                    "height": 64,
                },
            ),
            "sample": sample(780, 60, "prompt.0", 3.0, 1, initial_latent="encode.0"),
        }
        | output(1160, "sample.0", "rolling_kv_i2v"),
        "notes": [
            (
                (780, 460),
                (340, 190),
                "## Image to video\nThe image becomes the first frame of the video. To extend a "
                "video instead, give Encode Video its frames (Load Video, Get Video Components). The size is that of Encode "
                "Video; width and height of Sample Video are ignored.",
            ),
            ((1160, 460), (720, 190), REAL_MODELS),
        ],
    },
    "rolling_kv_two_prompts": {
        "nodes": LOADERS
        | {
            "vae": ("RollingKVLoadVAE", (1160, 440), {"vae_name": TINY}),
            "first_prompt": prompt(CIRCLE, 280),
            "second_prompt": prompt(SQUARE, 460),
            "first": sample(780, 60, "first_prompt.0", 3.0, 1),
            "second": sample(1160, 60, "second_prompt.0", 3.0, 1, state="first.1"),
        }
        | output(1540, "second.0", "rolling_kv_two_prompts"),
        "notes": [
            (
                (40, 460),
                (340, 190),
                "## Two prompts\nThe second sampler continues exactly where the first one stopped: "
                "its **state** input is the first one's output. Chain as many as you like. When you change the second "
                "prompt, only the second sampler runs again.",
            ),
            ((1540, 460), (720, 190), REAL_MODELS),
        ],
    },
    "rolling_kv_step_cache": {
        "nodes": LOADERS
        | {
            "model": ("RollingKVLoadModel", (40, 60), {"model_name": TINY, "preset": "causal-multistep"}),
            "cache": (
                "RollingKVStepCache",
                (400, 60),
                {"model": "model.0", "method": "TaylorSeer", "method.cache_interval": 3},
            ),
            "prompt": prompt(CIRCLE, 300),
            "negative": prompt("", 480),
            "sample": sample(780, 60, "prompt.0", 2.0, 1, negative="negative.0"),
        }
        | output(1160, "sample.0", "rolling_kv_step_cache"),
        "notes": [
            (
                (40, 460),
                (340, 190),
                "## Step cache\nMany steps, and most of what they compute hardly changes from one to the next: **Step Cache** "
                "leaves part of it out. After the run **Sample Video** says how much. Bypass the node to compare; the "
                "workflow rolling_kv_benchmark measures all methods.",
            ),
            (
                (1160, 460),
                (720, 230),
                multi_step_model("Keep the preset, set the size to 832 x 480 and **enlarge** to 1."),
            ),
        ],
    },
    "rolling_kv_benchmark": {
        "nodes": {name: node for name, node in LOADERS.items() if name != "cache"}
        | {
            "vae": ("RollingKVLoadVAE", (40, 440), {"vae_name": TINY}),
            "prompt": prompt(CIRCLE, 60),
            "negative": prompt("", 240),
            "benchmark": (
                "RollingKVBenchmark",
                (780, 60),
                {
                    "model": "model.0",
                    "positive": "prompt.0",
                    "negative": "negative.0",
                    "vae": "vae.0",
                    "steps": 12,
                    "guidance": 3,
                    "chunks": 1,
                    "width": 64,
                    "height": 64,
                },
                (840, 440),
            ),
        },
        "notes": [
            (
                (40, 560),
                (340, 210),
                "## Which step cache for this model?\n**Benchmark Step Caches** makes the same short video with every method, "
                "from gentle to strong, and shows table and plot when it is done. Choose there, then set the method in "
                "**Step Cache**.",
            ),
            (
                (400, 420),
                (340, 350),
                multi_step_model(
                    "Set **steps** (50), **width**, **height** and **guidance** to what you will work with: the figures hold "
                    "for that."
                ),
            ),
        ],
    },
    "quickstart": {
        "api_only": True,
        "nodes": LOADERS
        | {"prompt": prompt(CIRCLE, 280), "sample": sample(780, 60, "prompt.0", 5.0, 1)}
        | output(1160, "sample.0", "rolling_kv_quickstart"),
        "notes": [],
    },
}

BUILD = """({ nodes, notes }) => {
  const graph = window.app.graph
  graph.clear()
  const made = {}
  for (const [name, [type, pos, values, size]] of Object.entries(nodes)) {
    const node = LiteGraph.createNode(type)
    if (!node) throw new Error(`no node ${type}`)
    graph.add(node)
    node.pos = [...pos]
    made[name] = node
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
}


def build(url: str, names: list[str]) -> None:
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1920, "height": 1000})
        for setting, value in SETTINGS.items():
            page.request.post(f"{url}/settings/{setting}", data=value, headers=JSON)
        for name in names:
            description = WORKFLOWS[name]
            page.goto(url)  # anew: the page remembers pictures by node number
            page.wait_for_function("() => window.app?.vueAppReady && window.app.graph", timeout=120_000)
            page.wait_for_timeout(3000)  # the page then loads its last graph, or the default one
            page.evaluate(BUILD, {key: description[key] for key in ("nodes", "notes")})
            saved = page.evaluate(EXPORT)
            write(PACK / "workflows" / "api" / f"{name.removeprefix('rolling_kv_')}.json", saved["prompt"])
            if not description.get("api_only"):
                write(PACK / "workflows" / f"{name}.json", saved["workflow"])
                rectangle = page.evaluate(FRAME)
                page.wait_for_timeout(1000)
                save_thumbnail(page.screenshot(clip=rectangle), PACK / "workflows" / f"{name}.jpg")
        browser.close()


def save_thumbnail(png: bytes, path: Path) -> None:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((1024, 1024))
    picture.save(path, quality=85)


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(PACK))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8188", help="of a ComfyUI that has the pack")
    parser.add_argument("names", nargs="*", help=f"which to build (default: all): {', '.join(WORKFLOWS)}")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(WORKFLOWS)):
        parser.error(f"there is no workflow {', '.join(unknown)}")
    build(args.url, args.names or list(WORKFLOWS))
