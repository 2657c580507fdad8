"""One video on several processes: each has a part of every frame's tokens, and inside self-attention a part of the heads.

This is Ulysses' exchange (https://arxiv.org/abs/2309.14509) for a chunk with a cache. Outside of attention a process works on its own tokens.
In self-attention all tokens of the chunk come together for a part of the heads: the rolling cache of a process holds
these heads alone, at the same places as everywhere else, so sink, ring and all their rules are what they are on one
process. Weights, prompts and latents are whole on each of them.

What a pass sends, in values a process: of each layer (1 - 1/n) / n of queries, keys, values and of what attention makes of
them, S * dim each, and at the end as much of the S * 64 values of the flow (Wan 2.1) to each of the others.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def check_even(heads: int, tokens: int, ranks: int) -> None:
    """Raise ValueError unless so many heads, and the tokens of a latent frame, can be shared out evenly."""
    if heads % ranks == 0 and tokens % ranks == 0:
        return
    both = math.gcd(heads, tokens)
    fitting = ", ".join(str(count) for count in range(1, both + 1) if both % count == 0)
    raise ValueError(
        f"{heads} heads and {tokens} tokens a frame cannot be shared out evenly among {ranks} processes: take one "
        f"of {fitting}, or another size of the video"
    )


class HeadShards:
    """The processes that make one video together. Each has to do the same things in the same order.

    group: a process group of torch.distributed; None: all processes.
    sent: bytes that this process has sent to others.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.sent = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def check(self, heads: int, tokens: int) -> None:
        """Raise ValueError unless so many heads, and the tokens of a latent frame, can be shared out evenly."""
        check_even(heads, tokens, self.ranks)

    def own(self, tokens: torch.Tensor, frames: int, dim: int = 1) -> torch.Tensor:
        """Of [.., S, ..] tokens of whole frames this process's part of each frame, [.., S / ranks, ..]."""
        each = tokens.unflatten(dim, (frames, self.ranks, -1))
        return each.select(dim + 1, self.rank).flatten(dim, dim + 1)

    def own_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Of embedded patches [B, dim, f, h, w] this process's part of each frame, [B, dim, f, h * w / ranks]."""
        return patches.flatten(3).unflatten(3, (self.ranks, -1)).select(3, self.rank)

    def to_heads(self, frames: int, *parts: torch.Tensor) -> list[torch.Tensor]:
        """All tokens for a part of the heads: of each [B, S / ranks, H, D], [B, S, H / ranks, D]."""
        return [self._heads_of(part, frames) for part in parts]

    def _heads_of(self, part: torch.Tensor, frames: int) -> torch.Tensor:
        split = part.unflatten(2, (self.ranks, -1)).movedim(2, 0)  # [to, B, f t, h, D]
        came = self._exchange(split).unflatten(2, (frames, -1))  # [from, B, f, t, h, D]
        return came.movedim(0, 2).flatten(1, 3)

    def to_tokens(self, frames: int, heads: torch.Tensor) -> torch.Tensor:
        """The way back: of [B, S, H / ranks, D], [B, S / ranks, H, D]."""
        split = heads.unflatten(1, (frames, self.ranks, -1)).movedim(2, 0).flatten(2, 3)  # [to, B, f t, h, D]
        return self._exchange(split).movedim(0, 2).flatten(2, 3)

    def gather(self, frames: int, tokens: torch.Tensor) -> torch.Tensor:
        """What all processes have of tokens, in their order: of [B, S / ranks, C], [B, S, C]."""
        tokens = tokens.contiguous()
        came = [torch.empty_like(tokens) for _ in range(self.ranks)]
        dist.all_gather(came, tokens, group=self.group)
        self.sent += tokens.nbytes * (self.ranks - 1)
        return torch.stack(came, dim=2).unflatten(1, (frames, -1)).movedim(3, 2).flatten(1, 3)

    def any(self, mine: bool) -> bool:
        """Whether it is so in any of the processes, told to all of them."""
        return max(self._told(int(mine))) > 0

    def check_same(self, *mine: object) -> None:
        """Raise ValueError, in all processes, unless each of them has the same: else they would wait, or mix videos."""
        digest = hashlib.sha256(repr(mine).encode()).digest()
        if len(set(self._told(int.from_bytes(digest[:7], "little")))) > 1:
            raise ValueError(
                "the processes that share a video are not to make the same one: give each of them the same seed, number of "
                f"chunks, state and length of prompt; process {self.rank} has {', '.join(map(str, mine))}"
            )

    def _told(self, number: int) -> list[int]:
        """The numbers of all processes."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        mine = torch.tensor([number], device="cuda" if on_gpu else "cpu")
        came = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(came, mine, group=self.group)
        return torch.cat(came).tolist()

    def _exchange(self, split: torch.Tensor) -> torch.Tensor:
        """Send the i-th of [ranks, ...] to process i; returns what came from each."""
        split = split.contiguous()
        came = torch.empty_like(split)
        dist.all_to_all_single(came, split, group=self.group)
        self.sent += split.nbytes // self.ranks * (self.ranks - 1)
        return came


@contextmanager
def shared_by_torchrun(device: torch.device) -> Iterator[tuple[HeadShards | None, torch.device]]:
    """The processes that torchrun has started, and the device of this one; None where there is no other process.

    device: of a process that is alone. On CUDA each process takes the GPU of its number on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield None, device
        return
    if device.type == "cuda":
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= count:
            raise ValueError(
                f"there are {count} GPUs on this machine, and {number + 1} processes or more: take one for each GPU"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield HeadShards(), device
    finally:
        dist.destroy_process_group()


def patches_forward(embed_patches, shards: HeadShards):
    """A `forward` for the patch embedding that goes on with this process's tokens alone."""

    def forward(latents: torch.Tensor) -> torch.Tensor:
        return shards.own_patches(embed_patches(latents))

    return forward


def output_forward(project_out, shards: HeadShards, context):
    """A `forward` for the last projection that brings the tokens of all processes together again."""

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        flow = project_out(hidden_states)
        if context.running.keys_only:  # which has written its keys, and gives nothing else
            return flow.repeat(1, shards.ranks, 1)
        return shards.gather(context.frames, flow)

    return forward
