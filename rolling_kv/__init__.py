"""Causal Wan video models with a rolling KV cache: videos of any length at constant memory.

What is named here is the public face. Each name is imported from its module when it is first asked for, so that
importing this package alone loads nothing.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints.model import load_model
    from .config import CacheConfig, ExecutionConfig, SamplingConfig
    from .pipeline import Pipeline
    from .presets import PRESETS
    from .sampling.session import RollingSession
    from .sampling.state import CacheState
    from .schedules.reading import read_schedule
    from .schedules.schedule import PromptSchedule
    from .text import load_text_encoder
    from .vae.loading import load_vae

    __version__: str

__all__ = [
    "PRESETS",
    "CacheConfig",
    "CacheState",
    "ExecutionConfig",
    "Pipeline",
    "PromptSchedule",
    "RollingSession",
    "SamplingConfig",
    "__version__",
    "load_model",
    "load_text_encoder",
    "load_vae",
    "read_schedule",
]

_MODULES = {
    "PRESETS": ".presets",
    "CacheConfig": ".config",
    "CacheState": ".sampling.state",
    "ExecutionConfig": ".config",
    "Pipeline": ".pipeline",
    "PromptSchedule": ".schedules.schedule",
    "RollingSession": ".sampling.session",
    "SamplingConfig": ".config",
    "load_model": ".checkpoints.model",
    "load_text_encoder": ".text",
    "load_vae": ".vae.loading",
    "read_schedule": ".schedules.reading",
}


def __getattr__(name: str):
    if name == "__version__":
        value = _version()
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version that pyproject.toml says: of the folder that this package lies in, or as it was installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    if '\nname = "rolling-kv"\n' in text:
        return re.findall(r'^version = "(.+)"$', text, re.MULTILINE)[0]
    return metadata.version("rolling-kv")
