"""What a server answers to the pages' questions about graphs that do not run yet, where a test has no server."""

from rolling_kv.config import SamplingConfig
from rolling_kv.schedules.timeline import shown_in_seconds

WINDOW = {
    "limit": 21, "sink": 3, "memory": [], "kept": [33, 48], "writing": [48, 51], "frames": 51, "bytes": 6 << 30, "free": 22 << 30,
}  # fmt: skip
PLAN = {
    "parts": {"weights": 3 << 30, "cache": 6 << 30, "prompts": 96 << 20, "passes": 1 << 30, "host": 30 << 20}, "device": "cuda:0",
    "needed": 10 << 30, "free": 22 << 30, "host_free": 60 << 30, "fits": True, "remedies": [], "window": WINDOW, "chunk": 3,
    "preset": "self-forcing", "size": [832, 480], "seconds": 12.5625,
}  # fmt: skip


def schedule(body: dict):
    """As nodes/live/planning.py, for a model with the chunks of most."""
    try:
        read = shown_in_seconds(body["text"], SamplingConfig(), seconds=(body["sampler"] or {}).get("length"))
    except ValueError as error:
        return 200, {"error": str(error)}
    return 200, {**read.about(), "preset": "self-forcing" if body["model"] else None}


def plan(body: dict):
    return 200, PLAN
