"""A paper model: what a chunk should take on GPUs that nobody here has tried, from counts and from published rates.

Products and attention at the rates that such kernels reach, all else at the speed of memory, and messages one after the
other with the work: nothing overlaps. Measured figures belong in its place as soon as there are some.
"""

from __future__ import annotations

from typing import NamedTuple

from ...config import SamplingConfig
from ...geometry import TEXT_LENGTH
from ..figures import markdown
from ..random_model import SIZES, BenchSize
from .formula import sent, tokens_of

BYTES_PER_VALUE = 264
"""Read and written beside the products, of each value of a block's input, in half precision: counted kernels of the block."""
MESSAGES = 4
"""Exchanges of a layer: queries, keys, values, and the way back."""
ROOM = 0.9
"""Of a card's memory, that weights and caches may take."""
HALF = 2
"""Bytes of a value."""


class Card(NamedTuple):
    """What a GPU reaches. products, attention: operations a second. memory, link: bytes a second. delay: seconds a message.

    room: bytes of memory.
    """

    name: str
    products: float
    attention: float
    memory: float
    link: float
    delay: float
    room: float


CARDS = (
    Card("H100 SXM, NVLink", 600e12, 600e12, 3.0e12, 300e9, 20e-6, 80e9),
    Card("RTX 4090, PCIe 4.0", 150e12, 100e12, 0.95e12, 12e9, 40e-6, 24e9),
)


class Chunk(NamedTuple):
    """Seconds that a chunk takes with a full window: computing, and sending to other processes."""

    computing: float
    sending: float

    @property
    def all(self) -> float:
        return self.computing + self.sending


def chunk_of(size: BenchSize, card: Card, ranks: int = 1) -> Chunk:
    """A chunk of Self-Forcing's settings, its context pass included, on `ranks` cards."""
    sampling = SamplingConfig()
    tokens, seen = (tokens_of(size.height, size.width, frames) for frames in (sampling.chunk, size.window))
    blocks = size.layers * (sampling.passes + 1)
    products = 2 * tokens * (6 * size.dim**2 + 2 * size.dim * size.ffn) * blocks
    attention = 4 * tokens * (seen + TEXT_LENGTH) * size.dim * blocks
    moved = BYTES_PER_VALUE * tokens * size.dim * blocks
    computing = (products / card.products + attention / card.attention + moved / card.memory) / ranks
    if ranks == 1:
        return Chunk(computing, 0.0)
    bytes_sent = (
        sampling.passes * sent(size, tokens, ranks, HALF).all + sent(size, tokens, ranks, HALF, keys_only=True).all
    )
    return Chunk(computing, bytes_sent / card.link + MESSAGES * blocks * card.delay)


def cache_bytes(size: BenchSize, ranks: int = 1, itemsize: float = HALF) -> float:
    """Of the window's keys and values, on each of `ranks` cards."""
    return 2 * size.layers * tokens_of(size.height, size.width, size.window) * size.dim * itemsize / ranks


def weight_bytes(size: BenchSize) -> float:
    """Of the blocks in half precision, which every card has whole."""
    return HALF * size.layers * (8 * size.dim**2 + 2 * size.dim * size.ffn)


def fits(size: BenchSize, card: Card) -> bool:
    """Whether a card has room for the weights in half precision, and for one cache."""
    return weight_bytes(size) + cache_bytes(size) < card.room * ROOM


def streams_on(size: BenchSize, card: Card, seconds: float, itemsize: float = HALF) -> tuple[float, int]:
    """Videos that a card makes as fast as they are watched, and how many caches it has room for beside the weights.

    seconds: of video in a chunk.
    """
    room = int((card.room * ROOM - weight_bytes(size)) / cache_bytes(size, itemsize=itemsize))
    return seconds / chunk_of(size, card).all, max(room, 0)


def tables() -> str:
    """Both tables of docs/scale.md."""
    sizes = {name: SIZES[name] for name in ("1.3B", "14B")}
    rows = []
    for card in CARDS:
        for name, size in sizes.items():
            one = chunk_of(size, card)
            for ranks in (1, 2, 4, 6, 8):
                if size.heads % ranks or tokens_of(size.height, size.width, 1) % ranks or not fits(size, card):
                    continue
                chunk = chunk_of(size, card, ranks)
                rows.append([
                    card.name, name, str(ranks), f"{chunk.computing * 1e3:,.0f}", f"{chunk.sending * 1e3:,.0f}",
                    f"{chunk.all * 1e3:,.0f}", f"{one.all / chunk.all:.1f}", f"{cache_bytes(size, ranks) / 1e9:.1f}",
                ])  # fmt: skip
    head = ["card", "model", "cards", "computing ms", "sending ms", "chunk ms", "times as fast", "cache GB each"]
    shared = markdown(head, rows)
    seconds, rows = 0.75, []  # a chunk of 12 frames at 16 a second
    for card in CARDS:
        for name, size in sizes.items():
            if fits(size, card):
                live, room = streams_on(size, card, seconds)
                row = card.name, name, f"{live:.2f}", str(room), f"{1000 / live:,.0f}", f"{cache_bytes(size) / 1e9:.1f}"
                rows.append(list(row))
    head = ["card", "model", "live videos a card", "caches that fit", "cards for 1,000", "cache GB a video"]
    return "\n".join([*shared, "", *markdown(head, rows)])
