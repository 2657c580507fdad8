"""LongLive 1: the window is computed anew under a new prompt, in one pass without a mask."""

from dataclasses import replace

from rolling_kv.config import CacheConfig

from .case import Case, Prompt


class LongLive(Case):
    def cache(self) -> CacheConfig:
        switch = "joint" if self.config["recache"] else "hold"
        return replace(super().cache(), switch=switch, global_sink=self.config["global_sink"])

    def prompts(self) -> dict[int, Prompt]:
        """A switch that is asked for inside a chunk waits for the next one; no chunk begins with two."""
        waiting, prompts = list(self.config["switch_frames"]), {}
        for start in self.starts():
            if waiting and waiting[0] <= start:
                waiting.pop(0)
            elif prompts:
                continue
            segment = len(self.config["switch_frames"]) - len(waiting)
            prompts[start] = Prompt(self.tensors[f"prompt_embeds.{segment}"])
        return prompts

    def slots(self) -> dict[str]:
        return {"sink": range(self.config["sink_size"])}
