"""The frames that a rolling cache holds, in the order in which the originals keep them."""

from typing import NamedTuple

import torch

from rolling_kv.rope import rotary_angles, rotate, rotations


class Slots(NamedTuple):
    """What one layer of the conditional cache holds, a frame a slot: what is held for good first, then by age.

    keys: before RoPE, [B, slots, tokens, H, D].
    values: likewise.
    positions: in time, at which the cache keeps each slot's key.
    grid: tokens along height and width.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: list[int]
    grid: tuple[int, int]


def turned(keys: torch.Tensor, positions: list[int], grid: tuple[int, int], back: bool = False) -> torch.Tensor:
    """Keys [B, slots, tokens, H, D] with RoPE of each slot's position, or with that taken back."""
    angles = torch.stack([rotary_angles(keys.shape[-1], position, 1, *grid) for position in positions])
    return rotate(keys.flatten(1, 2), rotations(-angles if back else angles).flatten(0, 1)[None, :, None]).view_as(keys)


def read_slots(session) -> list[Slots]:
    """Each layer's slots in the open session, the chunk that was made last included."""
    cache = session._running().branches.caches["cond"]
    grid = session.model.geometry.grid(*session.latent_size)
    frames = cache.window.frames()
    sink = cache.config.sink
    shift = max(0, cache.window.end + cache.window.open - cache.window.capacity)
    order = sorted(range(len(frames)), key=lambda slot: frames[slot])
    positions = [
        frame + (shift if cache.config.positions == "window" and frame < sink else 0)
        for frame in map(frames.__getitem__, order)
    ]
    layers = []
    for layer in range(cache.shape.layers):
        (part,) = cache.store.open(layer, cache.window.filled * cache.shape.tokens_per_frame)
        roped, values = part.unflatten(2, (-1, cache.shape.tokens_per_frame))[:, :, order]
        cache.store.close(layer, [])
        layers.append(Slots(turned(roped, positions, grid, back=True), values, positions, grid))
    return layers
