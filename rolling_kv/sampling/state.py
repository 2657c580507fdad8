"""`CacheState`: the video so far, as the immutable value that graph edges carry.

A state is the clean latents and the log of how they came about. It needs no keys and values: those are a function of
the log, so replaying one context pass per chunk gives the same bits (see `sampling.session.RollingSession`). It may carry
them, which saves that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..geometry import Geometry, geometry_of

if TYPE_CHECKING:
    from .workspace import KeptKeys

Seeds = int | tuple[int, ...]
"""Of the noise: one for all videos of a batch, or one for each of them."""
_NOT_FINITE = (
    "the {} latents from latent frame {} on hold values that are no numbers (NaN or infinity), so the video ends before "
    "them. Likely causes: weights or a LoRA that are damaged, float16 where the model needs bfloat16, or a LoRA "
    "strength, guidance or shift far from what the model was trained for."
)


class Chunk(NamedTuple):
    """A finished chunk.

    start_frame: its first absolute latent frame.
    latents: clean, [B, C, f, h, w], in model space.
    """

    start_frame: int
    latents: torch.Tensor


class ChunkRecord(NamedTuple):
    """How one chunk came about and entered the cache.

    frames: latent frames.
    timestep: of its context pass.
    prompt: index into `CacheState.prompts`.
    negative: likewise, or -1 without guidance.
    seed: of a batch, one for all videos or one for each; None where the frames were given, not generated.
    switch: what was done to the cache before this chunk, one of `config.SWITCHES`; empty where nothing was.
    given: how many of a generated chunk's first frames were given.
    """

    frames: int
    timestep: float
    prompt: int
    negative: int
    seed: Seeds | None
    switch: str = ""
    given: int = 0


class CacheState(NamedTuple):
    """The video so far. Never changed in place: `extended` returns a new one that shares the old one's tensors.

    chunks: clean latents per chunk, [B, C, f, h, w], in model space and the model's dtype, in CPU memory.
    prompts: the distinct prompt embeddings that the log refers to, [B, L, D] each, in CPU memory.
    records: the log, one record per chunk.
    model: identity of the model that made it.
    key: digest of everything above; equal keys mean equal videos.
    texts: of each prompt, for people; None where nobody said it. No part of the key, and no bit depends on them.
    model_name: of the model, likewise.
    keys: what the working cache held there, where it was asked for, likewise. A file has none.
    """

    chunks: tuple[torch.Tensor, ...] = ()
    prompts: tuple[torch.Tensor, ...] = ()
    records: tuple[ChunkRecord, ...] = ()
    model: str = ""
    key: str = ""
    texts: tuple[str | None, ...] = ()
    model_name: str = ""
    keys: KeptKeys | None = None

    @property
    def frames(self) -> int:
        """Latent frames."""
        return sum(record.frames for record in self.records)

    @property
    def generated(self) -> int:
        """Latent frames of them that were not given."""
        return sum(record.frames for record in self.records if record.seed is not None)

    @property
    def geometry(self) -> Geometry:
        """Of its latents. Raises ValueError for an empty state."""
        if not self.chunks:
            raise ValueError("this cache state holds no frames yet")
        return geometry_of(self.chunks[0].shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels. Raises ValueError for an empty state."""
        return self.geometry.pixel_size(*self.chunks[0].shape[3:])

    @property
    def pixel_frames(self) -> int:
        return self.geometry.pixel_frames(self.frames) if self.chunks else 0

    @property
    def seconds(self) -> float:
        return self.geometry.seconds(self.frames) if self.chunks else 0.0

    @property
    def nbytes(self) -> int:
        carried = 0 if self.keys is None else self.keys.nbytes
        return sum(tensor.nbytes for tensor in self.chunks + self.prompts) + carried

    def latents(self) -> torch.Tensor:
        """All clean latents, [B, C, F, h, w], in model space. Raises ValueError for an empty state."""
        if not self.chunks:
            raise ValueError("this cache state holds no frames yet")
        return torch.cat(self.chunks, dim=2)

    def frames_between(self, start: int, end: int) -> torch.Tensor:
        """The clean latents of the absolute latent frames from `start` up to `end`, [B, C, F, h, w], in model space."""
        pieces, at = [], 0
        for chunk in self.chunks:
            first, last = max(start - at, 0), min(end - at, chunk.shape[2])
            if first < last:
                pieces.append(chunk[:, :, first:last])
            at += chunk.shape[2]
        return torch.cat(pieces, dim=2)

    def negative_at(self, index: int) -> torch.Tensor | None:
        """The negative prompt with which chunk number `index` enters a cache that has guidance; None for no known one.

        A chunk made without guidance has none of its own. It takes the next one in the log, which was the prompt of the
        session that first needed it: the log alone decides, so that a replay gives the same bits.
        """
        later = (record.negative for record in self.records[index:] if record.negative >= 0)
        known = next(later, None)
        return None if known is None else self.prompts[known]

    def extended(
        self,
        chunk: torch.Tensor,
        *,
        timestep: float,
        prompt: torch.Tensor,
        negative: torch.Tensor | None,
        seed: Seeds | None,
        switch: str = "",
        given: int = 0,
    ) -> CacheState:
        """This video with one more chunk. The prompts are kept as they are: nobody may change them.

        chunk: clean latents, [B, C, f, h, w], in model space; copied.
        timestep: of the context pass that will write it to a cache.
        prompt, negative: embeddings [B, L, D]; negative is None without guidance.
        seed: None where the frames were given, not generated.
        switch: what was done to the cache before this chunk.
        given: how many of a generated chunk's first frames were given.

        Raises ValueError for a chunk with values that are no numbers, so that none is decoded or continued.
        """
        chunk = chunk.detach().to("cpu", copy=True)  # whoever made it may go on to write into it
        if not chunk.isfinite().all():
            raise ValueError(_NOT_FINITE.format("sampled" if seed is not None else "given", self.frames))
        prompts = self.prompts
        prompts, prompt_index = _with_prompt(prompts, prompt)
        prompts, negative_index = _with_prompt(prompts, negative)
        record = ChunkRecord(chunk.shape[2], float(timestep), prompt_index, negative_index, seed, switch, given)
        key = _key_after(self.key, self.model, record, chunk, prompts[len(self.prompts) :])
        texts = (*self.texts, *[None] * (len(prompts) - len(self.texts)))
        chunks, records = (*self.chunks, chunk), (*self.records, record)
        return self._replace(chunks=chunks, prompts=prompts, records=records, key=key, texts=texts, keys=None)

    def named(self, known: Iterable[tuple[str, torch.Tensor]]) -> CacheState:
        """The same video with the texts of prompts that nobody has named yet.

        known: texts, each with its embeddings, [B or 1, L, D] of any device and dtype.
        """
        known = list(known)

        def text_of(prompt: torch.Tensor) -> str | None:
            return next((text for text, embeds in known if _became(embeds, prompt)), None)

        texts = [None if index >= len(self.texts) else self.texts[index] for index in range(len(self.prompts))]
        named = (text_of(prompt) if text is None else text for text, prompt in zip(texts, self.prompts))
        return self._replace(texts=tuple(named))

    @classmethod
    def from_log(
        cls,
        chunks: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor],
        records: Sequence[ChunkRecord],
        model: str,
        texts: Sequence[str | None] = (),
        model_name: str = "",
    ) -> CacheState:
        """The state that `extended` made of all this, chunk by chunk: its key follows. The tensors are shared.

        prompts: in the order in which the log comes to them; what it does not come to is left out.
        texts: of the prompts, as far as they are known. model_name: for people.
        """
        key, known = "", 0
        for chunk, record in zip(chunks, records):
            before, known = known, max(known, record.prompt + 1, record.negative + 1)
            key = _key_after(key, model, record, chunk, prompts[before:known])
        return cls(tuple(chunks), tuple(prompts[:known]), tuple(records), model, key, tuple(texts[:known]), model_name)

    def first(self, *, frames: int | None = None, seconds: float | None = None) -> CacheState:
        """The beginning of this video as it was when it was made: the same state by its key, to be continued from there.

        frames: the most latent frames that it may have. seconds: the longest that it may be. It ends with a whole chunk.

        Raises ValueError unless one of the two is given, and where not even the first chunk is that short.
        """
        if (frames is None) == (seconds is None):
            raise ValueError("say how much of the video to take, in latent frames or in seconds")
        geometry, count, at = self.geometry, 0, 0
        for record in self.records:
            at += record.frames
            if (frames is not None and at > frames) or (seconds is not None and not geometry.seconds(at) <= seconds):
                break
            count += 1
        if not count:
            least = self.records[0].frames
            raise ValueError(
                f"the video begins with a chunk of {least} latent frames, {geometry.seconds(least):g} s: no less can be "
                f"taken, got {f'{frames} latent frames' if seconds is None else f'{seconds:g} s'}"
            )
        if count == len(self.records):
            return self
        named = self.model, self.texts, self.model_name
        return CacheState.from_log(self.chunks[:count], self.prompts, self.records[:count], *named)

    def video(self, index: int) -> CacheState:
        """One video of a batch as a state of its own: what it is alone if it has a seed of its own, also by its key.

        index: its number, from 0. Raises IndexError where there is none.
        """
        batch = self.chunks[0].shape[0] if self.chunks else 0
        if not 0 <= index < batch:
            raise IndexError(f"there is no video {index} in a batch of {batch}")
        prompts = [prompt[index : index + 1] for prompt in self.prompts]
        alone = CacheState(model=self.model, model_name=self.model_name)
        for chunk, record in zip(self.chunks, self.records):
            alone = alone.extended(
                chunk[index : index + 1],
                timestep=record.timestep,
                prompt=prompts[record.prompt],
                negative=None if record.negative < 0 else prompts[record.negative],
                seed=record.seed[index] if isinstance(record.seed, tuple) else record.seed,
                switch=record.switch,
                given=record.given,
            )
        return alone.named((text, prompt) for text, prompt in zip(self.texts, prompts) if text is not None)

    def __repr__(self) -> str:  # error messages print their inputs
        if not self.chunks:
            return "CacheState(empty)"
        batch, _, _, height, width = self.chunks[0].shape
        return f"CacheState({self.frames} latent frames, {height}x{width} latents, batch {batch}, key {self.key[:8]})"


def _key_after(
    key: str, model: str, record: ChunkRecord, chunk: torch.Tensor, new_prompts: Sequence[torch.Tensor]
) -> str:
    """The key of a state with one more chunk. new_prompts: those that it brings."""
    digest = hashlib.sha256(f"{key} {model} {tuple(record)} {tuple(chunk.shape)}".encode())
    for tensor in (chunk, *new_prompts):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _with_prompt(prompts: tuple[torch.Tensor, ...], prompt: torch.Tensor | None):
    if prompt is None:
        return prompts, -1
    prompt = prompt.detach().cpu()
    for index, known in enumerate(prompts):
        if same_values(known, prompt):
            return prompts, index
    return prompts + (prompt,), len(prompts)


def _became(embeds: torch.Tensor, prompt: torch.Tensor) -> bool:
    """Whether a session that was given these embeddings, [B or 1, L, D], has made that prompt of them."""
    if embeds.shape[1:] != prompt.shape[1:] or embeds.shape[0] not in (1, prompt.shape[0]):
        return False
    return torch.equal(embeds.to(prompt.device, prompt.dtype).expand_as(prompt), prompt)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of the CPU are equal and of one dtype; at once where they are the same memory."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)
