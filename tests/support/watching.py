"""A page that follows runs: what the server tells it over the websocket, and the pictures that it fetches."""

from __future__ import annotations

import io
import json
import struct
import uuid
from collections.abc import Callable

import numpy as np
import websocket
from PIL import Image

from tools.comfyui.client import ComfyClient

PREVIEW_IMAGE = 1
"""Number of the server's binary messages that hold a picture."""


class Page:
    """Queues prompts of its own, or watches those of another page.

    events: (name, data) of all that was told of runs, in its order. pictures: of ComfyUI's own previews.
    """

    def __init__(self, client: ComfyClient):
        self.client, self.id = client, str(uuid.uuid4())
        self.events: list[tuple[str, dict]] = []
        self.pictures: list[Image.Image] = []
        address = client.url.replace("http", "ws", 1) + f"/ws?clientId={self.id}"
        self._connection = websocket.create_connection(address, timeout=300)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exception) -> None:
        self._connection.close()

    def run(self, graph: dict, on_event: Callable[[str, dict], None] = lambda name, data: None) -> str:
        """Queue a prompt and follow it to its end, which is returned: of execution_success, _error, _interrupted."""
        answer = json.loads(self.client.post("/prompt", {"prompt": graph, "client_id": self.id}))
        return self.follow(answer["prompt_id"], on_event)

    def follow(self, prompt_id: str | None, on_event: Callable[[str, dict], None] = lambda name, data: None) -> str:
        """Take what is told until a prompt has ended and is in the history; None: until a run has."""
        ending = None
        while True:
            message = self._connection.recv()
            if isinstance(message, bytes):
                if struct.unpack(">I", message[:4])[0] == PREVIEW_IMAGE:
                    self.pictures.append(Image.open(io.BytesIO(message[8:])))
                continue
            event = json.loads(message)
            name, data = event["type"], event.get("data", {})
            if name.startswith("rolling_kv."):
                self.events.append((name, data))
                on_event(name, data)
                if prompt_id is None and data["status"] not in ("running", "paused"):
                    return data["status"]
            elif (
                name in ("execution_success", "execution_error", "execution_interrupted")
                and data["prompt_id"] == prompt_id
            ):
                ending = name
            elif ending and name == "executing" and data["node"] is None and data["prompt_id"] == prompt_id:
                return ending  # the server writes its history between the two

    def chunks(self, node: str) -> list[dict]:
        return [data for name, data in self.events if name == "rolling_kv.chunk" and data["node"] == node]

    def statuses(self, node: str) -> list[str]:
        return [data["status"] for name, data in self.events if name == "rolling_kv.run" and data["node"] == node]

    def frames(self, strip: dict) -> np.ndarray:
        """The frames [T, height, width, 3] of a strip, from 0 to 255."""
        sheet = np.asarray(Image.open(io.BytesIO(self.client.get(f"/api{strip['url']}"))).convert("RGB"), dtype=int)
        height, width, columns = strip["height"], strip["width"], strip["columns"]
        places = [(number // columns * height, number % columns * width) for number in range(strip["frames"])]
        return np.stack([sheet[top : top + height, left : left + width] for top, left in places])

    def shown(self, node: str) -> np.ndarray:
        """The frames of all chunks of a node."""
        return np.concatenate([self.frames(event["strip"]) for event in self.chunks(node)])


def listed(client: ComfyClient) -> dict[str, dict]:
    """What a page that comes late is told: the runs by their id."""
    return {run["run"]: run for run in json.loads(client.get("/api/rolling_kv/runs"))["runs"]}
