"""Self Gradient Forcing: positions run over the frames of its training before they freeze."""

from dataclasses import replace

from rolling_kv.config import CacheConfig

from .case import Case


class SelfGradientForcing(Case):
    def cache(self) -> CacheConfig:
        aligned = self.config["position_mode"] == "top_aligned"
        return replace(super().cache(), span=self.config["train_frames"] if aligned else None)

    def slots(self) -> dict[str]:
        return {"slots": range(self.config["sink_size"])}
