"""Step caches: diffusers' methods to skip work between denoising steps of a chunk or clip. See `docs/caching.md`."""

from .attach import StepCache, StepCacheReport, apply_step_cache
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
from .watch import Forced, StepWatch, start_step_cache

__all__ = [
    "METHODS",
    "FasterCache",
    "FirstBlockCache",
    "Forced",
    "MagCache",
    "MagCacheCalibration",
    "PyramidAttentionBroadcast",
    "SeaCache",
    "StepCache",
    "StepCacheReport",
    "StepShape",
    "StepWatch",
    "TaylorSeer",
    "apply_step_cache",
    "start_step_cache",
    "why_unavailable",
]
