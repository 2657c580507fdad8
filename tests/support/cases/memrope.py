"""MemRoPE: what leaves is averaged into two frames behind the sink."""

from dataclasses import replace

from rolling_kv.config import CacheConfig

from .case import Case


class MemRope(Case):
    bfloat16_allowance = 1.05

    def cache(self) -> CacheConfig:
        config, cache = self.config, super().cache()
        if config["compression_method"] == "eviction" or cache.unlimited:
            return cache
        return replace(cache, leaving="memory", memory_alphas=(config["ema_alpha_long"], config["ema_alpha_short"]))

    def slots(self) -> dict[str]:
        sink = self.config["sink_size"]
        return {"sink": range(sink), "memory_long": range(sink, sink + 1), "memory_short": range(sink + 1, sink + 2)}
