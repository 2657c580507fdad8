"""Infinity-RoPE: keys at their slots, a flush or a cut where the prompt changes."""

from dataclasses import replace

from rolling_kv.config import CacheConfig

from .case import Case, Prompt


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

    def recorded_positions(self, ours: list[int]) -> list[int | None]:
        """Slot 0 alone was recorded after RoPE."""
        return [0, None, None]
