"""The pack's scripts in a page without ComfyUI: quick, for what a script does by itself. The frontend is no part of it."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from stage import translations

from tools.comfyui.env import PACK

URL = "http://bare.test"
THEMES = {
    "dark": {"--comfy-menu-bg": "#353535", "--comfy-input-bg": "#222", "--input-text": "#ddd", "--descrip-text": "#999",
             "--border-color": "#4e4e4e", "--error-text": "#ff4444"},
    "light": {"--comfy-menu-bg": "#f5f5f5", "--comfy-input-bg": "#fff", "--input-text": "#333", "--descrip-text": "#666",
              "--border-color": "#ccc", "--error-text": "#c62828"},
}  # fmt: skip
SHELL = """<!doctype html><meta charset="utf-8"><style>:root {{ {variables} }} body {{ background: var(--comfy-menu-bg); margin: 0 }}</style>
<script type="module">{imports}; window.ready = true</script>"""


class BarePage:
    """A page with some of the scripts.

    page: of Playwright. scripts: names of files in web/. answers: for a route of ours ("schedule"), a function from the body to
    (status, answer). theme: one of THEMES. posts: what was sent, as (route, body). errors: of the page.
    """

    def __init__(self, page, scripts, answers, theme="dark"):
        self.page, self.answers, self.posts, self.errors = page, answers, [], []
        variables = "; ".join(f"{name}: {value}" for name, value in THEMES[theme].items())
        imports = "; ".join(f'await import("/extensions/rolling-kv/{name}")' for name in scripts)
        self.shell = SHELL.format(variables=variables, imports=imports)
        page.on("pageerror", lambda error: self.errors.append(error.message))
        page.route(f"{URL}/**", self._serve)
        page.goto(URL)
        page.wait_for_function("() => window.ready")

    def _serve(self, route):
        path = urlsplit(route.request.url).path
        if path.startswith("/api/rolling_kv/"):
            name, body = path.rsplit("/", 1)[1], json.loads(route.request.post_data or "null")
            self.posts.append((name, body))
            status, answer = self.answers[name](body)
            return route.fulfill(status=status, json=answer)
        if path == "/api/i18n":
            return route.fulfill(json=translations())
        if path == "/scripts/bare.js":
            return route.fulfill(path=PACK / "tests/support/web/bare.js", content_type="text/javascript")
        if path.startswith("/scripts/"):  # both are one module: they share the page
            return route.fulfill(body='export { api, app } from "./bare.js"', content_type="text/javascript")
        if path.startswith("/extensions/"):
            return route.fulfill(path=PACK / "web" / path.rsplit("/", 1)[1], content_type="text/javascript")
        return route.fulfill(body=self.shell, content_type="text/html")
