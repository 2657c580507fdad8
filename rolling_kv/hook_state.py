"""Another name of `rolling_kv.hooks.state`, for code that was written before the hooks had a folder."""

from .hooks.state import *  # noqa: F403
