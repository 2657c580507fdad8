"""The working cache that a run leaves behind, for the next run to take over."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..cache.kept import KeptFrames
from ..cache.prompt import PromptCache
from ..cache.rolling import RollingKVCache
from ..cache.sizes import CacheShape
from ..checkpoints.model import CausalModel
from ..config import CacheConfig, ExecutionConfig

BRANCHES = ("cond", "uncond")
"""Names of the guidance branches."""

Caches = dict[str, RollingKVCache]
"""The rolling cache of each guidance branch, by the branch's name."""


class KnownPrompt(NamedTuple):
    """A prompt's keys and values in one set of weights.

    embeds: on the CPU, [B, L, D]. weights: which of the model's `transformers`.
    """

    embeds: torch.Tensor
    weights: int
    prompt: PromptCache


class CacheSpec(NamedTuple):
    """What must agree for one run to take over another's working cache."""

    model: str  # identity: keys and values belong to the weights that made them
    shape: CacheShape
    config: CacheConfig
    branches: tuple[str, ...]
    execution: ExecutionConfig
    device: torch.device
    joint: bool = False  # whether passes hold several chunks, and context passes see what those of Rolling-Forcing see

    @classmethod
    def of(
        cls,
        model: CausalModel,
        batch: int,
        latent_size: tuple[int, int],
        config: CacheConfig,
        execution: ExecutionConfig,
        branches: int,
        joint: bool = False,
        ranks: int = 1,
    ) -> CacheSpec:
        """What a run of `branches` guidance branches on `batch` videos of that latent size needs.

        ranks: processes that share the heads.
        """
        shape = CacheShape.of(model.transformer, batch, *latent_size, model.dtype, ranks)
        execution = replace(execution, cuda_graphs=False)  # whether passes are recorded changes no key
        return cls(model.identity, shape, config, BRANCHES[:branches], execution, model.compute_device(), joint)


class KeptKeys(NamedTuple):
    """A working cache as it stood at a state, in CPU memory, for the state to carry. Nobody changes it.

    spec: of the cache. caches: of each guidance branch, in tuples, which ComfyUI looks into to see what RAM an output takes.
    cached_chunks: chunks of the state whose context pass they have seen.
    """

    spec: CacheSpec
    caches: tuple[KeptFrames, ...]
    cached_chunks: int

    @property
    def nbytes(self) -> int:
        """Bytes in CPU memory."""
        return sum(frames.nbytes for frames in self.caches)


@dataclass
class Workspace:
    """Keeps a model's working cache between two runs, so that the next run can take it over.

    Holds one cache, at one point of one video. It is only ever an optimisation: a run that finds another video here
    replays its own, with the same result.

    spec, caches: what the last run left; None where nothing was left.
    key: of the state at which the caches stand.
    cached_chunks: chunks of that state whose context pass they have seen.
    prompts: that the last passes saw. They hold for every video that such caches fit.
    """

    spec: CacheSpec | None = None
    caches: Caches | None = None
    key: str = ""
    cached_chunks: int = 0
    prompts: list[KnownPrompt] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the compute device; those of the prompts not counted."""
        return sum(cache.nbytes.device for cache in (self.caches or {}).values())

    @property
    def device_nbytes(self) -> int:
        """Bytes on the compute device."""
        return self.nbytes + sum(known.prompt.nbytes for known in self.prompts)

    @property
    def host_nbytes(self) -> int:
        """Bytes in CPU memory, of a cache that is offloaded."""
        return sum(cache.nbytes.host for cache in (self.caches or {}).values())

    def take(self, spec: CacheSpec, key: str) -> tuple[Caches | None, int, list[KnownPrompt]]:
        """Hand the working cache over to a run: nothing is kept here any more.

        spec: what the run needs. key: of the state that it continues.
        Returns the caches, the chunks that they have seen, and prompts: no chunks, and emptied caches, where they stand at
        another video; None, 0 and no prompts where they do not fit.
        """
        fits = self.spec == spec
        caches, cached, prompts = (self.caches, self.cached_chunks, self.prompts) if fits else (None, 0, [])
        if caches is not None and self.key != key:
            cached = 0
            for cache in caches.values():
                cache.reset()
        self.clear()
        return caches, cached, prompts

    def leave(self, spec: CacheSpec, caches: Caches, key: str, cached_chunks: int, prompts: list[KnownPrompt]) -> None:
        """Keep the working cache of a run that has ended at the state with that key."""
        self.spec, self.caches, self.key, self.cached_chunks, self.prompts = spec, caches, key, cached_chunks, prompts

    def clear(self) -> None:
        """Let go of the working cache's memory."""
        self.spec, self.caches, self.key, self.cached_chunks, self.prompts = None, None, "", 0, []
