"""The frames that a rolling cache holds, in the order in which the originals keep them."""

from typing import NamedTuple

import torch

from rolling_kv.rope import rotary_angles, rotate, rotations


class Slots(NamedTuple):
    """What one layer of the conditional cache holds, a frame a slot: first what is held for good, then the rest by age.

    keys: [B, slots, tokens, H, D]; before RoPE where positions are those of the window, else after it.
    values: likewise.
    """

    keys: torch.Tensor
    values: torch.Tensor


def turned(keys: torch.Tensor, positions: list[int], grid: tuple[int, int], back: bool = False) -> torch.Tensor:
    """Keys [B, slots, tokens, H, D] with the RoPE of each slot's position, or with that taken back.

    positions: in time. grid: tokens along height and width.
    """
    angles = torch.cat([rotary_angles(keys.shape[-1], position, 1, *grid) for position in positions])
    return rotate(keys.flatten(1, 2), rotations(-angles if back else angles)[None, :, None]).view_as(keys)


def read_slots(session) -> list[Slots]:
    """Each layer's slots in the open session, once the context pass of the last chunk is done."""
    run = session._running()
    run.history.bring_to(session.state, "", None, None, 0.0, lambda: None)  # no switch, so no prompts
    cache = run.branches.caches["cond"]
    window, tokens = cache.window, cache.shape.tokens_per_frame
    held = list(window.kept[: window.kept_until(window.end)])
    others = sorted(set(window.frames()) - set(held))
    order = [window.slot(frame) for frame in held + others]
    positions = [*cache._places()[: len(held)], *others]
    layers = []
    for layer in range(cache.shape.layers):
        (part,) = cache.store.open(layer, window.filled * tokens)
        keys, values = part.unflatten(2, (-1, tokens))[:, :, order].cpu()
        cache.store.close(layer, [])
        if cache.config.positions == "window":
            keys = turned(keys, positions, cache.shape.grid, back=True)
        layers.append(Slots(keys, values))
    return layers
