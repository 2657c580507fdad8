"""Step caches: diffusers' methods to skip work between denoising steps of a chunk or clip. See `docs/caching.md`."""

from .attach import Forced, StepCache, apply_step_cache, start_step_cache
from .fastercache import FasterCache
from .firstblock import FirstBlockCache
from .magcache import MagCache, MagCacheCalibration
from .method import Knob, Pass, StepCacheMethod, StepClock, StepShape
from .probe import StepProbe
from .pyramid_attention_broadcast import PyramidAttentionBroadcast
from .report import StepCacheReport
from .seacache import SeaCache
from .taylorseer import TaylorSeer

METHODS: dict[str, type[StepCacheMethod]] = {
    method.name: method
    for method in (PyramidAttentionBroadcast, FasterCache, FirstBlockCache, TaylorSeer, MagCache, SeaCache)
}
"""The methods by name."""

__all__ = [
    "METHODS",
    "FasterCache",
    "FirstBlockCache",
    "Forced",
    "Knob",
    "MagCache",
    "MagCacheCalibration",
    "Pass",
    "PyramidAttentionBroadcast",
    "SeaCache",
    "StepCache",
    "StepCacheMethod",
    "StepCacheReport",
    "StepClock",
    "StepProbe",
    "StepShape",
    "TaylorSeer",
    "apply_step_cache",
    "start_step_cache",
]
