"""A stand-in for ComfyUI's server: the frontend of a package, the pack's scripts, and what a test lets happen.

It has no nodes that run. The nodes' schemas are those of tests/data/object_info.json; the runs, their strips and what the pack's
routes answer are set by the test, and events are sent into the page's websocket, which Playwright holds.
"""

from __future__ import annotations

import json
import mimetypes
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tools.comfyui.env import PACK
from tools.generate.schemas import PREFIX, recorded

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.45.0"}
STATS = {"system": {"os": "linux", "comfyui_version": "0.27.0", "python_version": "3", "argv": []}, "devices": []}

ANSWERS = {
    "/userdata/user.css": "",
    "/userdata/comfy.templates.json": [],
    "/users": {"storage": "server", "migrated": True},
    "/system_stats": STATS,
    "/features": {},
    "/embeddings": [],
    "/queue": {"queue_running": [], "queue_pending": []},
    "/prompt": {"exec_info": {"queue_remaining": 0}},
    "/history": {},
    "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
    "/userdata": [],
    "/v2/userdata": [],
    "/workflow_templates": {},
    "/experiment/models": [],
    "/global_subgraphs": {},
    "/node_replacements": {},
}
"""What the page asks for when it opens, and gets."""


def newest_frontend() -> Path:
    """The folder of the frontend in comfyui-frontend-package, of the tests' own environment."""
    (package,) = find_spec("comfyui_frontend_package").submodule_search_locations
    return Path(package) / "static"


def translations() -> dict:
    """What /i18n answers: ComfyUI's app/custom_node_manager.py, for one pack."""

    def read(folder, name):
        path = folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    return {
        folder.name: read(folder, "main") | {name: read(folder, name) for name in ("nodeDefs", "settings")}
        for folder in (PACK / "locales").iterdir()
    }


def schemas() -> dict:
    """What /object_info answers: the recorded schemas, with the folders of their packs, which are not recorded."""
    modules = {True: "custom_nodes.rolling-kv", False: "nodes"}
    return {name: schema | {"python_module": modules[name.startswith(PREFIX)]} for name, schema in recorded().items()}


class Stage:
    """A context manager: serves inside the `with`.

    frontend: the folder to serve. runs: what GET /rolling_kv/runs lists. strips: WebP by (run, chunk). answers: for a POST route of
    ours ("steer"), a function from its body to (status, answer). posts: what was sent to those, as (route, body). settings: the
    page's. sockets: the open websockets of pages that `watch` was called for; `send` writes to all of them.
    """

    def __init__(self, frontend: Path):
        self.frontend = frontend
        self.settings = dict(SETTINGS)
        self.sockets = []
        self.reset()

    def reset(self) -> None:
        """Forget what a test has set and what was asked; pages stay open."""
        self.runs, self.strips, self.answers, self.posts, self.missed = [], {}, {}, [], []

    def __enter__(self) -> Stage:
        handler = type("Handler", (Handler,), {"stage": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def post(self, path: str, value) -> None:
        """Change a setting, as the client of a real server does: path "/settings/<id>"."""
        self.settings[path.removeprefix("/settings/")] = value

    def watch(self, page) -> None:
        """Play the server's part in the websockets of a page."""

        def opened(socket):
            self.sockets.append(socket)
            socket.on_message(lambda _: None)
            socket.on_close(lambda *_: socket in self.sockets and self.sockets.remove(socket))
            self.send("status", {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "stage"}, [socket])

        page.route_web_socket(re.compile(r"/ws\b"), opened)

    def send(self, kind: str, data: dict, sockets=None) -> None:
        """Send an event to the pages."""
        for socket in self.sockets if sockets is None else sockets:
            socket.send(json.dumps({"type": kind, "data": data}))

    def get(self, path: str):
        """(status, content type, bytes) of a path."""
        if path.startswith("/extensions/rolling-kv/"):
            return self.file(PACK / "web", path.removeprefix("/extensions/rolling-kv/"))
        api = path.removeprefix("/api")
        strip = re.fullmatch(r"/rolling_kv/runs/(\w+)/chunks/(\d+)\.webp", api)
        if strip:
            data = self.strips.get((strip[1], int(strip[2])))
            return (200, "image/webp", data) if data else (404, "text/plain", b"")
        scripts = [f"/extensions/rolling-kv/{path.name}" for path in sorted((PACK / "web").glob("*.js"))]
        known = ANSWERS | {
            "/object_info": schemas(),
            "/settings": self.settings,
            "/i18n": translations(),
            "/extensions": scripts,
            "/rolling_kv/runs": {"runs": self.runs},
        }
        if path.startswith("/api/"):
            if api in known:
                return 200, "application/json", json.dumps(known[api]).encode()
            self.missed.append(path)
            return 404, "application/json", b"{}"
        if path == "/user.css":
            return 200, "text/css", b""
        return self.file(self.frontend, path.lstrip("/") or "index.html")

    def file(self, folder: Path, name: str):
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            self.missed.append(name)
            return 404, "text/plain", b""
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return 200, "text/javascript" if path.suffix == ".js" else kind, path.read_bytes()

    def receive(self, path: str, body):
        """(status, answer) to a POST."""
        path = path.removeprefix("/api")
        if path.startswith("/settings"):
            self.settings.update(body if path == "/settings" else {path.removeprefix("/settings/"): body})
            return 200, {}
        if path.startswith("/rolling_kv/"):
            route = path.removeprefix("/rolling_kv/")
            self.posts.append((route, body))
            return self.answers[route](body) if route in self.answers else (200, {})
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stage: Stage

    def do_GET(self):
        self.answer(*self.stage.get(unquote(urlsplit(self.path).path)))

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(data)
        except ValueError:
            body = data
        status, answer = self.stage.receive(unquote(urlsplit(self.path).path), body)
        self.answer(status, "application/json", json.dumps(answer).encode())

    def answer(self, status, kind, data):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        lasting = self.path.startswith("/assets/")  # their names change with their content
        self.send_header("Cache-Control", "max-age=86400, immutable" if lasting else "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
