"""The guidance branches of a session: a rolling cache for each, at one point of a video, and the prompts that they see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..cache.pinned import check_room
from ..cache.prompt import Branch, PromptCache
from ..cache.rolling import RollingKVCache
from ..cache.sizes import CacheBytes
from ..checkpoints.model import CausalModel
from ..devices import to_device
from .checks import fitted_embeds
from .state import CacheState, same_values
from .workspace import Caches, CacheSpec, Workspace


class GuidanceBranches:
    """The caches of all branches move together: what one has seen, the others have.

    spec: the caches' shape and settings.
    caches: one for each branch of the spec.
    cached: chunks of the session's state whose context pass they have seen.
    """

    def __init__(self, spec: CacheSpec, caches: Caches, cached: int):
        self.spec = spec
        self.caches = caches
        self.cached = cached
        self.prompts: list[tuple[torch.Tensor, PromptCache]] = []  # with the embeddings on the CPU

    @classmethod
    def open(cls, spec: CacheSpec, workspace: Workspace, key: str, capacity: int) -> GuidanceBranches:
        """Take over what the workspace holds for the state with that key, or allocate.

        capacity: latent frames to allocate where the window is unlimited.
        Raises ValueError if the caches are to be kept in CPU memory and there is too little for all of them.
        """
        caches, cached = workspace.take(spec, key)
        if caches is None:
            kept = RollingKVCache.bytes_kept(spec.shape, spec.config, spec.config.limit or capacity)
            if spec.config.offload:
                check_room(kept.host * len(spec.branches))
            with torch.inference_mode():
                caches = {n: RollingKVCache(spec.shape, spec.config, spec.device, capacity) for n in spec.branches}
        return cls(spec, caches, cached)

    @property
    def nbytes(self) -> CacheBytes:
        """Bytes that keys and values take now, of all branches together; those of the prompts not counted."""
        held = [cache.nbytes for cache in self.caches.values()]
        return CacheBytes(sum(part.device for part in held), sum(part.host for part in held))

    def reserve(self, frames: int) -> None:
        """Make room for a video of `frames` latent frames in every branch. Only an unlimited window ever grows.

        Raises ValueError if the caches are kept in CPU memory and there is too little for all of them.
        """
        first = next(iter(self.caches.values()))
        if self.spec.config.offload and self.spec.config.unlimited and frames > first.window.capacity:
            kept = RollingKVCache.bytes_kept(self.spec.shape, self.spec.config, frames)
            check_room(kept.host * len(self.caches) - self.nbytes.host)
        for cache in self.caches.values():
            cache.reserve(frames)

    def for_prompts(self, prompt: torch.Tensor, negative: torch.Tensor | None) -> list[Branch]:
        """The conditional branch, and with guidance the unconditional one, for embeddings [B, L, D] on the CPU."""
        branches = [
            Branch(cache, self._prompt_cache(embeds))
            for cache, embeds in zip(self.caches.values(), (prompt, negative))
            if embeds is not None
        ]
        used = [branch.prompt for branch in branches]  # a long video has many others, one after the other
        self.prompts = [(source, known) for source, known in self.prompts if known in used]
        return branches

    def _prompt_cache(self, embeds: torch.Tensor) -> PromptCache:
        # On the CPU, where comparing them does not wait for the device.
        for source, known in self.prompts:
            if same_values(source, embeds):
                return known
        made = PromptCache(to_device(embeds, self.spec.device))
        self.prompts.append((embeds, made))
        return made

    def replay(
        self,
        state: CacheState,
        model: CausalModel,
        forward: Callable[..., object],
        negative: torch.Tensor | None,
        on_pass: Callable[[], None],
    ) -> None:
        """Run the context pass of every chunk of the state that the caches have not seen yet.

        model: that the caches belong to; forward: of its attachment.
        negative: the session's own negative prompt, with guidance.
        on_pass: called before each context pass; whatever it raises cancels.
        """
        fit = partial(fitted_embeds, model, self.spec.shape.batch, name="a prompt of the cache state")

        def past_negative(index: int) -> torch.Tensor | None:
            if len(self.caches) == 1:
                return None
            known = state.negative_at(index)
            return negative if known is None else fit(known)

        for index in range(self.cached, len(state.records)):
            record = state.records[index]
            # Another model may have made this video, in another dtype.
            latents = to_device(state.chunks[index].to(self.spec.shape.dtype), self.spec.device)
            rows = 1 if record.seed is None else record.frames  # as the original embeds the timestep of given frames
            on_pass()
            branches = self.for_prompts(fit(state.prompts[record.prompt]), past_negative(index))
            for branch in branches:
                if not branch.cache.window.open:
                    branch.cache.begin(record.frames)
                with torch.inference_mode():
                    forward(latents, record.timestep, branch, time_rows=rows, keys_only=True)
            for branch in branches:  # all or none: a pass that fails leaves the branches at the same point
                branch.cache.commit()
            self.cached = index + 1

    def leave_cancelled_chunk(self, state: CacheState, chunk: int) -> None:
        """Start over if a cancelled chunk is open and what comes next, of the state or of `chunk` frames, is of another size.

        A cancelled chunk may have overwritten frames that the next one still sees; one of the same size overwrites it
        in turn.
        """
        waiting = state.records[self.cached :]
        frames = waiting[0].frames if waiting else chunk
        if any(cache.window.open not in (0, frames) for cache in self.caches.values()):
            for cache in self.caches.values():
                cache.reset()
            self.cached = 0

    def close(self, workspace: Workspace | None, key: str) -> None:
        """Leave the caches in a workspace, at the state with that key; None: give their memory back.

        Whatever an exception still refers to holds no memory any more.
        """
        caches, prompts, self.caches, self.prompts = self.caches, self.prompts, {}, []
        for _, prompt in prompts:
            prompt.release()
        if workspace is not None:
            workspace.leave(self.spec, caches, key, self.cached)
        else:
            for cache in caches.values():
                cache.release()
