"""The guidance branches of a session: a rolling cache for each, at one point of a video, and the prompts that they see."""

from __future__ import annotations

import torch

from ..cache.joint import JointKVCache
from ..cache.pinned import check_room
from ..cache.prompt import Branch, PromptCache
from ..cache.rolling import RollingKVCache
from ..cache.sizes import CacheBytes
from ..devices import check_memory, to_device
from .state import CacheState, same_values
from .workspace import Caches, CacheSpec, KeptKeys, KnownPrompt, Workspace


class GuidanceBranches:
    """The caches of all branches move together: what one has seen, the others have.

    spec: the caches' shape and settings.
    caches: one for each branch of the spec.
    cached: chunks of the session's state whose context pass they have seen.
    prompts: that passes have seen and may see again.
    opened_with: the switch with which the last chunk was opened.
    """

    def __init__(self, spec: CacheSpec, caches: Caches, cached: int, prompts: list[KnownPrompt]):
        self.spec = spec
        self.caches = caches
        self.cached = cached
        self.opened_with = ""
        self.prompts = prompts

    @classmethod
    def open(cls, spec: CacheSpec, workspace: Workspace, state: CacheState, capacity: int) -> GuidanceBranches:
        """Take over what the workspace holds for a state, or take what the state itself carries, or begin with nothing.

        capacity: latent frames to allocate where the window is unlimited.
        Raises ValueError if the caches are to be kept in CPU memory and there is too little for all of them.
        """
        caches, cached, prompts = workspace.take(spec, state.key)
        if caches is None:
            made = JointKVCache if spec.joint else RollingKVCache
            kept = made.bytes_kept(spec.shape, spec.config, spec.config.limit or capacity)
            if spec.config.offload:
                check_room(kept.host * len(spec.branches))
            with torch.inference_mode():
                caches = {n: made(spec.shape, spec.config, spec.device, capacity) for n in spec.branches}
        if not cached and state.keys is not None and state.keys.spec == spec:
            with torch.inference_mode():
                for cache, frames in zip(caches.values(), state.keys.caches):
                    cache.restore(frames)
            cached = state.keys.cached_chunks
        return cls(spec, caches, cached, prompts)

    def kept_keys(self) -> KeptKeys | None:
        """What the caches hold, for a state to carry; None where a chunk is half begun, or nothing has been seen.

        Raises ValueError where there is too little RAM.
        """
        if not self.cached:
            return None
        held = self.nbytes
        check_memory(
            held.host or held.device,
            "keeping them",
            "close other programs, make the window or the video smaller, or do without (keep_keys)",
        )
        kept = [cache.kept_frames() for cache in self.caches.values()]
        whole = tuple(frames for frames in kept if frames is not None)
        return KeptKeys(self.spec, whole, self.cached) if len(whole) == len(kept) else None

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

    def for_prompts(self, prompt: torch.Tensor, negative: torch.Tensor | None, weights: int = 0) -> list[Branch]:
        """The conditional branch, and with guidance the unconditional one, for embeddings [B, L, D] on the CPU.

        weights: which of the model's `transformers` the pass runs through.
        """
        branches = [
            Branch(cache, self._prompt_cache(embeds, weights))
            for cache, embeds in zip(self.caches.values(), (prompt, negative))
            if embeds is not None
        ]
        used = [branch.prompt for branch in branches]  # a long video has many others, one after the other
        self.prompts = [known for known in self.prompts if known.weights != weights or known.prompt in used]
        return branches

    def _prompt_cache(self, embeds: torch.Tensor, weights: int) -> PromptCache:
        # On the CPU, where comparing them does not wait for the device.
        for known in self.prompts:
            if known.weights == weights and same_values(known.embeds, embeds):
                return known.prompt
        made = PromptCache(to_device(embeds, self.spec.device))
        self.prompts.append(KnownPrompt(embeds, weights, made))
        return made

    def leave_cancelled_chunk(self, state: CacheState, chunk: int, switch: str) -> None:
        """Start over if a cancelled chunk is open that what comes next, of the state or of `chunk` frames, does not overwrite.

        It may have overwritten frames that a chunk of another size still sees. And a switch is done once.
        """
        waiting = state.records[self.cached :]
        frames = waiting[0].frames if waiting else chunk
        is_open = any(cache.window.open for cache in self.caches.values())
        switched = is_open and not waiting and bool(self.opened_with or switch)
        if switched or any(cache.window.open not in (0, frames) for cache in self.caches.values()):
            self.start_over()

    def start_over(self, cached: int = 0, offset: float = 0) -> None:
        """Forget every frame. cached: chunks that need not be seen. offset: by which cuts among them move positions."""
        for cache in self.caches.values():
            cache.reset()
            cache.offset = offset
        self.cached = cached
        self.opened_with = ""

    def close(self, workspace: Workspace | None, key: str) -> None:
        """Leave the caches in a workspace, at the state with that key; None: give their memory back.

        Whatever an exception still refers to holds no memory any more.
        """
        caches, prompts, self.caches, self.prompts = self.caches, self.prompts, {}, []
        if workspace is not None:
            workspace.leave(self.spec, caches, key, self.cached, prompts)
        else:
            for known in prompts:
                known.prompt.release()
            for cache in caches.values():
                cache.release()
