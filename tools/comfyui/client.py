"""Talking to a ComfyUI server: queue a prompt, follow it over the websocket, fetch what it made."""

from __future__ import annotations

import contextlib
import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import websocket

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

TEXT_EVENT = 3
"""Number of the server's binary messages that hold a node's id and a text."""

SILENCE = 900
"""Seconds without any message after which a running prompt counts as lost."""


WRITING = 100
"""Tenths of a second within which the history tells of a prompt that has ended."""


class PromptRejected(RuntimeError):
    """The server did not accept the prompt: a missing node, a wrong input, a missing file."""


class PromptFailed(RuntimeError):
    """A node raised while the prompt ran. `event` is the server's execution_error."""

    def __init__(self, event: dict):
        self.event = event
        super().__init__(f"{event['node_type']} ({event['node_id']}): {event['exception_message'].strip()}")


class PromptInterrupted(RuntimeError):
    """The prompt was cancelled."""


class ComfyClient:
    """One client of the server at `url`, for example "http://127.0.0.1:8188"."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.client_id = str(uuid.uuid4())

    def get(self, path: str, timeout: float = 60) -> bytes:
        """The body of a GET. Raises OSError (urllib.error.HTTPError for a refusal)."""
        with _direct.open(self.url + path, timeout=timeout) as response:
            return response.read()

    def post(self, path: str, body: dict) -> bytes:
        """The body of the answer to a JSON POST. Raises OSError (urllib.error.HTTPError for a refusal)."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _direct.open(request, timeout=60) as response:
            return response.read()

    def alive(self) -> bool:
        try:
            return "system" in json.loads(self.get("/system_stats", timeout=2))
        except (OSError, ValueError):
            return False

    def object_info(self, node_id: str | None = None) -> dict:
        """Schemas by node id: of one node (empty when the server does not know it) or of all."""
        return json.loads(self.get("/object_info" + (f"/{urllib.parse.quote(node_id)}" if node_id else "")))

    def has_nodes(self, prompt: dict) -> bool:
        """Whether the server knows every node of an API prompt."""
        return {node["class_type"] for node in prompt.values()} <= self.object_info().keys()

    def interrupt(self) -> None:
        """Cancel what is running now."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Unload the models and drop the cached node outputs, before any later prompt runs.

        The server does that between two prompts, and a prompt that is queued at once can be faster; so an idle one goes first.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        self.run({"idle": {"class_type": "PreviewAny", "inputs": {"source": ""}}})

    def view(self, file: dict) -> bytes:
        """The bytes of a file that an output names by `filename`, `subfolder` and `type`."""
        query = {key: file[key] for key in ("filename", "subfolder", "type")}
        return self.get("/view?" + urllib.parse.urlencode(query), timeout=300)

    def run(
        self,
        prompt: dict,
        on_progress: Callable[[str, int, int], None] | None = None,
        on_text: Callable[[str, str], None] | None = None,
    ) -> dict:
        """Queue an API prompt, wait for its end and return its outputs: node id to what the node put out.

        `on_progress(node_id, step, steps)` is called when a node starts (0 of 0) and at each of its steps; it may call
        `interrupt`. `on_text(node_id, text)` is called when a node shows a line of text. Raises PromptRejected, PromptFailed or PromptInterrupted. Ctrl-C cancels on the server too.
        """
        address = self.url.replace("http", "ws", 1) + f"/ws?clientId={self.client_id}"
        connection = websocket.create_connection(address, timeout=SILENCE)
        try:
            prompt_id = self._queue(prompt)
            try:
                self._follow(connection, prompt_id, on_progress or _ignore, on_text or _ignore)
            except KeyboardInterrupt:
                with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the server
                    self.post("/queue", {"delete": [prompt_id]})
                    self.post("/interrupt", {"prompt_id": prompt_id})
                raise
        finally:
            connection.close()
        return self.outputs(prompt_id)

    def outputs(self, prompt_id: str) -> dict:
        """What each node of a finished prompt put out, by node id. Raises KeyError for one that did not finish."""
        for _ in range(WRITING):  # the server tells of the end before it writes its history
            history = json.loads(self.get(f"/history/{prompt_id}"))
            if prompt_id in history:
                break
            time.sleep(0.1)
        return history[prompt_id]["outputs"]

    def _queue(self, prompt: dict) -> str:
        prompt_id = str(uuid.uuid4())
        try:
            answer = json.loads(
                self.post("/prompt", {"prompt": prompt, "client_id": self.client_id, "prompt_id": prompt_id})
            )
        except urllib.error.HTTPError as refusal:
            if refusal.code != 400:
                raise
            raise PromptRejected(_explain(json.loads(refusal.read()))) from None
        if answer["node_errors"]:
            raise PromptRejected(_explain(answer))
        return prompt_id

    def _follow(self, connection, prompt_id: str, on_progress: Callable, on_text: Callable) -> None:
        failure = None
        while True:
            message = connection.recv()
            if isinstance(message, bytes):  # a line of text, or a preview image
                kind, length = struct.unpack(">II", message[:8])
                if kind == TEXT_EVENT:
                    on_text(message[8 : 8 + length].decode(), message[8 + length :].decode())
                continue
            event = json.loads(message)
            kind, data = event["type"], event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "progress":
                on_progress(data["node"], data["value"], data["max"])
            elif kind == "execution_error":
                failure = PromptFailed(data)
            elif kind == "execution_interrupted":
                failure = PromptInterrupted(f"cancelled in {data['node_type']} ({data['node_id']})")
            elif kind == "executing" and data["node"] is None:
                break
            elif kind == "executing":
                on_progress(data["node"], 0, 0)
        if failure:
            raise failure


def _ignore(*_) -> None:
    pass


def _explain(answer: dict) -> str:
    """A server's refusal as lines for people: the error, then each node's errors."""
    error = answer.get("error", {})
    lines = [f"{error.get('message', 'the prompt was refused')} {error.get('details', '')}".strip()]
    for node_id, node in answer.get("node_errors", {}).items():
        for problem in node["errors"]:
            lines.append(f"{node['class_type']} ({node_id}): {problem['message']}: {problem['details']}")
    return "\n".join(lines)


def load_prompt(path: Path) -> dict:
    """An API prompt from a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def first_file(outputs: dict, *suffixes: str) -> dict:
    """The first saved file of a prompt's outputs whose name ends in one of `suffixes`. Raises LookupError.

    First by the ids of the nodes: the server lists outputs as they came, and what it has cached changes that order.
    """
    for node_id in sorted(outputs, key=lambda name: (len(name), name)):
        for files in outputs[node_id].values():
            for file in files:
                if isinstance(file, dict) and file.get("filename", "").lower().endswith(suffixes):
                    return file
    raise LookupError(f"the prompt saved no file of type {' or '.join(suffixes)}")
