"""From a node of ComfyUI to a run that pages can watch."""

from __future__ import annotations

from functools import partial

import comfy.model_management as mm
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..job import Job
from . import planning
from .routes import RUNS, add_routes
from .runs import Preview, Run, Runs


def set_up() -> None:
    """Let the server tell of runs, and answer for them and for what is not run yet."""
    server = PromptServer.instance
    server.app[RUNS] = runs = Runs(server.send_sync)
    add_routes(server.routes, runs)
    planning.add_routes(server.routes)


def fingerprint(hidden) -> str | None:
    """For `fingerprint_inputs`: what a steered run has made is not what the node's inputs say, so it is made anew."""
    return PromptServer.instance.app[RUNS].steered.get(hidden.unique_id)


def are_watched() -> bool:
    """Whether pictures of runs are made at all."""
    return PromptServer.instance.app[RUNS].settings.on


def watched(
    hidden, job: Job, *, fps: float | None = None, endless: bool = False, preview: Preview | None = None
) -> Run:
    """The run of a node. hidden: of its class. endless: it goes on until somebody stops it. The others: see `Run`."""
    context, node, start = get_executing_context(), hidden.unique_id, job.start
    return Run(
        PromptServer.instance.app[RUNS],
        prompt_id="" if context is None else context.prompt_id,
        node=node,
        display_node=hidden.dynprompt.get_display_node_id(node),
        workflow=_workflow_of(hidden.extra_pnginfo),
        geometry=job.model.geometry,
        fps=fps or job.model.geometry.fps,
        size=(start.width, start.height),
        start=start.frames,
        end=None if endless else job.frames,
        chunks=None if endless else job.chunks,
        steered=job,
        preview=preview,
        free=partial(mm.get_free_memory, job.model.patcher.load_device),
    )


def _workflow_of(extra_pnginfo) -> str | None:
    """The id of the workflow that a page has sent along with its prompt; anybody may have sent anything."""
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    known = workflow.get("id") if isinstance(workflow, dict) else None
    return known if isinstance(known, str) else None
