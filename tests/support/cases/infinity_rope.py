"""Infinity-RoPE: keys at their slots, a flush or a cut where the prompt changes."""

from dataclasses import replace

import torch

from rolling_kv.config import CacheConfig

from .case import Case, Prompt
from .slots import turned


class InfinityRope(Case):
    def cache(self) -> CacheConfig:
        # After a flush the chunk stands at the slots 3, 4, 5.
        return replace(super().cache(), switch="flush", cut_flush=True, cut_offset=self.config["cut_position"] - 3)

    def prompts(self) -> dict[int, Prompt]:
        prompts = {0: Prompt(self.tensors["prompt_embeds.0"])}
        for segment, switch in enumerate(self.config["switches"], start=1):
            prompts[switch["frame"]] = Prompt(self.tensors[f"prompt_embeds.{segment}"], switch["kind"])
        return prompts

    def slots(self) -> dict[str]:
        return {"slots": range(3)}

    def recorded(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The key of slot 0 alone was recorded after RoPE, at position 0."""
        recorded = super().recorded(name, like)
        if "_k" not in name:
            return recorded
        grid = self.config["height"] // 2, self.config["width"] // 2
        return torch.cat([turned(recorded[:, :1], [0], grid, back=True), recorded[:, 1:]], dim=1)
