"""Render workflows/api/quickstart.json to a video file: through ComfyUI where there is one, else through the engine."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
from tqdm import tqdm

from rolling_kv.atomic import replacing

from .comfyui.client import ComfyClient, PromptFailed, PromptInterrupted, PromptRejected, first_file, load_prompt
from .comfyui.env import PACK, ComfyError, find_install, install_missing
from .comfyui.server import ComfyServer

QUICKSTART = PACK / "workflows" / "api" / "quickstart.json"
TINY_MODEL = PACK / "models" / "tiny"
LOCAL_SERVER = "http://127.0.0.1:8188"


def running_client(prompt: dict) -> ComfyClient | None:
    """A client of $COMFYUI_URL, else of a local server that is running with this pack's nodes; None without one.

    Raises ComfyError when $COMFYUI_URL is set and is not such a server.
    """
    named = os.environ.get("COMFYUI_URL")
    client = ComfyClient(named or LOCAL_SERVER)
    if client.alive() and client.has_nodes(prompt):
        return client
    if named:
        raise ComfyError(f"COMFYUI_URL is {named}, but no ComfyUI with the Rolling KV nodes answers there.")
    return None


class Progress:
    """One line on the terminal: the node at work and its steps."""

    def __init__(self, prompt: dict):
        self.prompt = prompt
        self.bar = tqdm(total=1, bar_format="{desc:<24} {bar} {n_fmt}/{total_fmt}  {elapsed}")

    def __call__(self, node_id: str, step: int, steps: int) -> None:
        node = self.prompt.get(node_id, {"class_type": node_id})
        self.bar.set_description_str(node.get("_meta", {}).get("title") or node["class_type"], refresh=False)
        self.bar.total, self.bar.n = steps or 1, step
        self.bar.refresh()


def render_on_server(client: ComfyClient, prompt: dict, output: Path) -> None:
    progress = Progress(prompt)
    try:
        outputs = client.run(prompt, progress)
    finally:
        progress.bar.close()
    with replacing(output, what="video") as file:
        file.write_bytes(client.view(first_file(outputs, ".mp4")))


def engine_arguments(prompt: dict) -> list[str]:
    """The quickstart prompt as arguments of `python -m rolling_kv generate`, whose default model is the same."""
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    sample, cache = inputs["RollingKVSample"], inputs["RollingKVAttachCache"]
    if sample["length_unit"] != "seconds":
        raise ComfyError(f"{QUICKSTART.name} gives its length in {sample['length_unit']}; the engine takes seconds.")
    request = {
        "prompt": inputs["RollingKVEncodePrompt"]["text"],
        "seconds": sample["length"],
        "seed": sample["seed"],
        "width": sample["width"],
        "height": sample["height"],
        "guidance": sample.get("guidance.strength", 1 if sample["guidance"] == "off" else None),
        "window": cache.get("window.frames", "all" if cache["window"] == "all frames" else None),
        "sink": cache.get("sink.frames"),
        "scale": inputs["RollingKVDecodeVideo"]["enlarge"],
    }
    given = {name: value for name, value in request.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def render_with_engine(prompt: dict, output: Path) -> None:
    run_engine("generate", *engine_arguments(prompt), "--output", str(output))


def run_engine(*arguments: str) -> None:
    """Run `python -m rolling_kv`; its own messages say what is wrong when it fails."""
    result = subprocess.run([sys.executable, "-m", "rolling_kv", *arguments], cwd=PACK)
    if result.returncode:
        sys.exit(result.returncode)


def render(output: Path, engine_only: bool) -> None:
    prompt = load_prompt(QUICKSTART)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not TINY_MODEL.is_dir():
        run_engine("make-tiny", str(TINY_MODEL))
    if engine_only:
        return render_with_engine(prompt, output)
    client = running_client(prompt)
    if client:
        print(f"Rendering on the ComfyUI server at {client.url}")
        return render_on_server(client, prompt, output)
    install = find_install()
    if install is None:
        print("No ComfyUI was found (set COMFYUI_PATH to its folder to use it): rendering with the engine alone")
        return render_with_engine(prompt, output)
    install_missing(install)
    print(f"Starting ComfyUI at {install.path}", flush=True)
    with ComfyServer(install) as server:
        render_on_server(server.client, prompt, output)


def describe(video: Path) -> str:
    with av.open(video) as container:
        stream = container.streams.video[0]
        frames, rate = stream.frames, float(stream.average_rate)
        return f"{frames} frames of {stream.width}x{stream.height} at {rate:g} fps, {frames / rate:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=PACK / "output/quickstart.mp4", help="file to write")
    parser.add_argument("--engine", action="store_true", help="do not look for a ComfyUI")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server that was started is stopped
    output = args.output.absolute()
    try:
        render(output, args.engine)
    except (ComfyError, PromptRejected, PromptFailed) as problem:
        sys.exit(f"{problem}\nTo render without ComfyUI: bash run.sh --engine")
    except (PromptInterrupted, KeyboardInterrupt):
        sys.exit("Cancelled.")
    print(f"\nThe video is {output}\n  {describe(output)}")
    print(
        "Next:\n"
        f"  another prompt, seed or length: edit {QUICKSTART.relative_to(PACK)} and run this again\n"
        "  without ComfyUI: .venv/bin/python -m rolling_kv generate --help\n"
        "  in ComfyUI: put this folder into custom_nodes, restart, and open a workflow under Templates, Rolling KV\n"
        "  with a trained model: README.md says which files there are and where they go"
    )


if __name__ == "__main__":
    main()
