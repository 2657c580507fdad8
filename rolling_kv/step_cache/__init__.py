"""Step caches: diffusers' methods to skip work between denoising steps of a chunk or clip. See `docs/caching.md`."""

from .attach import Pass, StepCache, StepCacheReport, apply_step_cache
from .methods import (
    METHODS,
    FasterCache,
    FirstBlockCache,
    MagCache,
    MagCacheCalibration,
    PyramidAttentionBroadcast,
    SeaCache,
    StepShape,
    TaylorSeer,
    why_unavailable,
)
from .probe import Forced, StepProbe, start_step_cache

__all__ = [
    "METHODS",
    "FasterCache",
    "FirstBlockCache",
    "Forced",
    "MagCache",
    "MagCacheCalibration",
    "Pass",
    "PyramidAttentionBroadcast",
    "SeaCache",
    "StepCache",
    "StepCacheReport",
    "StepShape",
    "StepProbe",
    "TaylorSeer",
    "apply_step_cache",
    "start_step_cache",
    "why_unavailable",
]
