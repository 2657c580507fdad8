"""What pages and scripts ask the server for. Names in the routes are ours, never paths; ComfyUI refuses other origins."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ...rolling_kv.config import check_choice, check_flag, check_whole
from ...rolling_kv.messages import shown
from ..guard import told
from .runs import ACTIONS, ROUTE, PreviewSettings, Runs

RUNS = web.AppKey("rolling_kv_runs", Runs)
"""Where the server's application has its runs."""
LARGEST = 64 * 2**10
"""Most bytes of a request."""
SIZES = 32, 1024
"""Least and most pixels along the longer side of a preview."""
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}


def add_routes(routes: web.RouteTableDef, runs: Runs) -> None:
    """Let a server answer for these runs."""

    @routes.get(f"{ROUTE}/runs")
    async def listed(request: web.Request) -> web.Response:
        return web.json_response({"runs": runs.listed()}, headers={"Cache-Control": "no-store"})

    # Any name is taken here: ComfyUI would look for a file of one that is not.
    @routes.get(ROUTE + "/runs/{run}/chunks/{name}")
    async def strip(request: web.Request) -> web.Response:
        named = re.fullmatch(r"([1-9][0-9]{0,8})\.webp", request.match_info["name"], re.ASCII)
        strip = named and runs.strip(request.match_info["run"], int(named[1]))
        if strip is None:
            raise web.HTTPNotFound(headers={"Cache-Control": "no-store"})
        return web.Response(body=strip.data, content_type="image/webp", headers=FOREVER)

    @routes.post(f"{ROUTE}/preview")
    async def preview(request: web.Request) -> web.Response:
        try:
            given = await read_json(request)
            settings = PreviewSettings(given.get("on", True), given.get("size", PreviewSettings().size))
            check_flag("on", settings.on)
            check_whole("size", settings.size, *SIZES)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        runs.settings = settings
        return web.json_response(settings._asdict())

    @routes.post(f"{ROUTE}/steer")
    async def steer(request: web.Request) -> web.Response:
        try:
            given = await read_json(request)
            texts = {name: given.get(name, "") for name in ("run", "action", "prompt", "how")}
            for name, text in texts.items():
                if not isinstance(text, str):
                    raise ValueError(f"{name} is to be text, got {shown(text)}")
            check_choice("the action", texts["action"], ACTIONS)
            run = runs.get(texts.pop("run"))
            if run is None:
                raise LookupError
            remark = await asyncio.to_thread(run.steer, **texts)
        except ValueError as error:
            return web.json_response({"error": told(str(error))}, status=400)
        except LookupError:
            return web.json_response({"error": "there is no such run, or it has ended"}, status=404)
        return web.json_response(run.about() | {"remark": remark})


def answer_with(routes: web.RouteTableDef, name: str, answer: Callable[[dict], dict], largest: int = LARGEST) -> None:
    """Let a server answer POSTs with a function from one JSON object to another, which may raise ValueError or OSError.

    It is called in a thread: it may read files. name: of the route. largest: most bytes of a request. What cannot be answered, as half of
    a schedule that is being typed, is told with status 200: a browser would log any other in red.
    """

    @routes.post(f"{ROUTE}/{name}")
    async def handle(request: web.Request) -> web.Response:
        try:
            given = await read_json(request, largest)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        try:
            said = await asyncio.to_thread(answer, given)
        except (ValueError, OSError) as error:
            said = {"error": told(str(error))}
        return web.json_response(said)


async def read_json(request: web.Request, largest: int = LARGEST) -> dict[str, Any]:
    """The object that a request has sent. Raises ValueError for anything else, and HTTPRequestEntityTooLarge."""
    read = bytearray()
    try:
        async for part in request.content.iter_any():
            read += part
            if len(read) > largest:
                raise web.HTTPRequestEntityTooLarge(largest, len(read))
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise ValueError(f"the request cannot be read: {' '.join(str(error).split())}") from None
    try:
        given = json.loads(read)
    except (ValueError, RecursionError):
        raise ValueError("the request is to be a JSON object, and is none") from None
    if not isinstance(given, dict):
        raise ValueError("the request is to be a JSON object, and is none")
    return given
