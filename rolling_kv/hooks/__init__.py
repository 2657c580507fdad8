"""diffusers' proposed hook API for rolling caches, on `cache/`. See `docs/hook-api.md`."""

from .attach import (
    ROLLING_KV_CACHE_HOOK,
    apply_rolling_kv_cache,
    get_rolling_kv_cache_state,
    remove_rolling_kv_cache,
)
from .state import RollingKVCacheConfig, RollingKVCacheState

__all__ = [
    "ROLLING_KV_CACHE_HOOK",
    "RollingKVCacheConfig",
    "RollingKVCacheState",
    "apply_rolling_kv_cache",
    "get_rolling_kv_cache_state",
    "remove_rolling_kv_cache",
]
