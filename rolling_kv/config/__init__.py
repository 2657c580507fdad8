"""Settings as frozen values: what the cache keeps, how a chunk is sampled, how passes are computed.

Units: `chunk`, `window` and `sink` count latent frames. One latent frame is four pixel frames, the very first is one.
"""

from .cache import (
    ACCUMULATION,
    ALL_FRAMES,
    CACHE_STORAGES,
    CONTEXTS,
    LEAVING,
    MOST_FRAMES,
    POSITIONS,
    SWITCHES,
    CacheConfig,
)
from .checks import check_choice, check_flag, check_real, check_whole
from .execution import (
    ANY_DEVICE_BACKEND,
    ATTENTION_BACKENDS,
    RECORDABLE_PACKINGS,
    SPEEDS,
    WEIGHT_STORAGES,
    ExecutionConfig,
)
from .sampling import GIVEN_FRAMES, MOST_CHUNK_FRAMES, MOST_STEPS, SAMPLERS, SamplingConfig

__all__ = [
    "ACCUMULATION",
    "ALL_FRAMES",
    "ANY_DEVICE_BACKEND",
    "ATTENTION_BACKENDS",
    "CACHE_STORAGES",
    "CONTEXTS",
    "CacheConfig",
    "ExecutionConfig",
    "GIVEN_FRAMES",
    "LEAVING",
    "MOST_CHUNK_FRAMES",
    "MOST_FRAMES",
    "MOST_STEPS",
    "POSITIONS",
    "RECORDABLE_PACKINGS",
    "SAMPLERS",
    "SPEEDS",
    "SWITCHES",
    "SamplingConfig",
    "WEIGHT_STORAGES",
    "check_choice",
    "check_flag",
    "check_real",
    "check_whole",
]
