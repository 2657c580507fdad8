"""Reward-Forcing: what leaves is folded into the sink."""

from dataclasses import replace

from rolling_kv.config import CacheConfig

from .case import Case


class RewardForcing(Case):
    def cache(self) -> CacheConfig:
        return replace(super().cache(), leaving="ema", ema_alpha=self.config["ema_alpha"])

    def slots(self) -> dict[str]:
        return {"sink": range(self.config["sink_size"])}
