"""What a state is, for people: its facts, and a row for each stretch of the video that was made in one way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..messages import listed, printable, shortened
from .state import CacheState, ChunkRecord, Seeds

PROMPT_LENGTH = 60
"""Characters of a prompt in the table."""


class Stretch(NamedTuple):
    """Consecutive chunks with the same prompts and seed, of which the first one alone may begin with a switch.

    start, end: latent frames. start_seconds, end_seconds: of the video.
    chunks: how many.
    prompt: its text, or its number where nobody knows the text.
    negative: likewise; empty without guidance.
    switch: what was done to the cache before the first chunk, one of `config.SWITCHES`; empty where nothing was.
    seed: of a batch, one for all videos or one for each; None where the frames were given.
    """

    start: int
    end: int
    start_seconds: float
    end_seconds: float
    chunks: int
    prompt: str
    negative: str
    switch: str
    seed: Seeds | None


class StateSummary(NamedTuple):
    """frames, chunks: latent frames and the chunks that they lie in. pixel_frames, seconds: of the video.
    height, width: pixels. batch: videos. geometry: of the models that have such latents, for people.
    model: identity. model_name: for people. dtype: of the latents. nbytes: of latents and prompts.
    """

    frames: int
    chunks: int
    pixel_frames: int
    seconds: float
    height: int
    width: int
    batch: int
    geometry: str
    model: str
    model_name: str
    dtype: str
    nbytes: int
    keys_nbytes: int
    key: str
    stretches: tuple[Stretch, ...]

    def facts(self) -> dict[str, str]:
        """What holds for all of it, in words, each under what it is about."""
        batch = "" if self.batch == 1 else f"{self.batch} videos of "
        return {
            "model": f"{printable(self.model_name)} ({printable(self.model)}), latents of {self.geometry}",
            "video": f"{batch}{self.seconds:g} s, {self.pixel_frames} frames, {self.width}x{self.height}; {self.frames} "
            f"latent frames in {self.chunks} chunks",
            "memory": f"{self.nbytes / 2**20:.1f} MiB, latents in {self.dtype} and prompts{self._carried()}",
            "key": printable(self.key),
        }

    def _carried(self) -> str:
        return f"; {self.keys_nbytes / 2**20:.1f} MiB of keys and values" if self.keys_nbytes else ""

    def table(self) -> str:
        """The stretches as lines of text, with a head."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def markdown(self) -> str:
        """The same table in Markdown."""
        head, *rows = [[cell.replace("|", r"\|") for cell in row] for row in self._rows()]
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("from", "to", "latents", "seed", "switch", "prompt")]
        for part in self.stretches:
            seeds = part.seed if isinstance(part.seed, tuple) else (part.seed,)
            seed = "given" if part.seed is None else listed([str(own) for own in seeds])
            negative = part.negative and f" (not: {shortened(printable(part.negative), PROMPT_LENGTH)})"
            prompt = shortened(printable(part.prompt), PROMPT_LENGTH) + negative
            times = f"{part.start_seconds:g} s", f"{part.end_seconds:g} s", f"{part.start} to {part.end}"
            rows.append((*times, seed, part.switch or "-", prompt))
        return rows


def summarize(state: CacheState) -> StateSummary:
    """What a state is. Its tensors may be on the meta device: no value is read. Raises ValueError for an empty state."""
    height, width = state.size
    return StateSummary(
        frames=state.frames,
        chunks=len(state.chunks),
        pixel_frames=state.pixel_frames,
        seconds=state.seconds,
        height=height,
        width=width,
        batch=state.chunks[0].shape[0],
        geometry=state.geometry.name,
        model=state.model,
        model_name=state.model_name,
        dtype=str(state.chunks[-1].dtype).removeprefix("torch."),
        nbytes=state._replace(keys=None).nbytes,
        keys_nbytes=0 if state.keys is None else state.keys.nbytes,
        key=state.key,
        stretches=tuple(_stretches(state)),
    )


def _stretches(state: CacheState) -> Iterator[Stretch]:
    texts = [f"prompt {index}" if text is None else text for index, text in enumerate(state.named(()).texts)]
    geometry, at = state.geometry, 0
    for records in _alike(state.records):
        first, start, at = records[0], at, at + sum(record.frames for record in records)
        yield Stretch(
            start,
            at,
            geometry.seconds(start),
            geometry.seconds(at),
            len(records),
            texts[first.prompt],
            "" if first.negative < 0 else texts[first.negative],
            first.switch,
            first.seed,
        )


def _alike(records: Sequence[ChunkRecord]) -> list[list[ChunkRecord]]:
    groups: list[list[ChunkRecord]] = []
    for record in records:
        way = record.prompt, record.negative, record.seed, ""
        last = groups[-1][0] if groups else None
        if last is not None and way == (last.prompt, last.negative, last.seed, record.switch):
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups
