"""Training clips of the transformer: a pool of motions in code space, painted in random colours when they are drawn.

The code is linear in the pixels, and a frame is background + (colour - background) * coverage. So it is enough to keep the
code of the coverage, per colour channel, and a clip in any colours, also with a change of colour, costs nothing to make.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from .code import LinearCode, blocks
from .world import (
    BACKGROUNDS,
    COLOURS,
    SIDE,
    SIZES,
    Scene,
    coverage,
    random_scene,
    random_start,
    recoloured,
    trajectory,
)

LATENT_FRAMES = 12
CHUNK = 3


class Batch(NamedTuple):
    """latents [B, 16, 12, 8, 8]; prompts: two for each clip; second [B, 4]: chunks that follow the second prompt;
    begins [B]: the clip starts the video (else the first chunk lacks its past, and is only context)."""

    latents: torch.Tensor
    prompts: list[tuple[str, str]]
    second: torch.Tensor
    begins: torch.Tensor


class Pool:
    """`motions` [N, 3, 16, 12, 8, 8] in float16: the code of the coverage for each colour channel."""

    def __init__(self, motions: torch.Tensor, scenes: list[Scene], begins: torch.Tensor, code: LinearCode):
        self.motions, self.scenes, self.begins, self.code = motions, scenes, begins, code
        self.weight_sum = code.weight.sum((2, 3, 4))  # [16, 3]: the code of a constant colour, up to the mean
        self.offset = torch.einsum("ncijk,cijk->n", code.weight, code.mean)

    @classmethod
    def make(cls, code: LinearCode, clips: int, seed: int = 3) -> Pool:
        generator = torch.Generator().manual_seed(seed)
        motions, scenes, begins = [], [], []
        weight = code.weight.permute(1, 0, 2, 3, 4).reshape(48, -1)
        for _ in range(clips):
            scene = random_scene(generator)
            late = bool(torch.rand((), generator=generator) < 0.5)
            start = random_start(scene, generator)
            if late:
                skip = 1 + int(torch.randint(240, (), generator=generator))
                path = trajectory(scene, start, skip + 4 * LATENT_FRAMES)[skip:]
            else:
                path = trajectory(scene, start, 4 * LATENT_FRAMES - 3)
                path = torch.cat([path[:1].expand(3, -1), path])
            axis = torch.arange(SIDE) + 0.5
            x, y = axis.view(1, 1, SIDE) - path[:, 0, None, None], axis.view(1, SIDE, 1) - path[:, 1, None, None]
            inside = coverage(scene.shape, SIZES[scene.size], x, y)
            cells = blocks(inside[None, None])[0].flatten(3)  # [12, 8, 8, 256]
            motions.append((cells @ weight.T).permute(3, 0, 1, 2).unflatten(0, (3, 16)).half())
            scenes.append(scene)
            begins.append(not late)
        return cls(torch.stack(motions), scenes, torch.tensor(begins), code)

    def state(self) -> dict:
        keys = ("shape", "colour", "direction", "size", "speed", "background")
        return {
            "motions": self.motions,
            "scenes": [[getattr(s, k) for k in keys] for s in self.scenes],
            "begins": self.begins,
        }

    @classmethod
    def from_state(cls, state: dict, code: LinearCode) -> Pool:
        return cls(state["motions"], [Scene(*values) for values in state["scenes"]], state["begins"], code)

    def draw(
        self, count: int, generator: torch.Generator, begins: bool = False, switch: float = 0.35, unnamed: float = 0.06
    ) -> Batch:
        """`count` clips; a share `switch` of them changes the colour at a chunk border, a share `unnamed` has no prompt.

        begins: only clips that start the video.
        """
        allowed = self.begins.nonzero()[:, 0] if begins else torch.arange(len(self.scenes))
        rows = allowed[torch.randint(len(allowed), (count,), generator=generator)]
        chunks = LATENT_FRAMES // CHUNK
        second = torch.zeros(count, chunks, dtype=torch.bool)
        fronts, backs, prompts = torch.empty(count, chunks, 3), torch.empty(count, 3), []
        for index, row in enumerate(rows.tolist()):
            look = random_scene(generator)
            first = replace(self.scenes[row], colour=look.colour, background=look.background)
            then = recoloured(first, generator)
            chance = torch.rand(2, generator=generator)
            if chance[0] < switch:
                second[index, int(torch.randint(1, chunks, (), generator=generator)) :] = True
            fronts[index] = torch.tensor(COLOURS[first.colour])
            fronts[index, second[index]] = torch.tensor(COLOURS[then.colour], dtype=torch.float32)
            backs[index] = torch.tensor(BACKGROUNDS[first.background])
            prompts.append(("", "") if chance[1] < unnamed else (first.prompt, then.prompt))
        fronts, backs = fronts / 127.5 - 1, backs / 127.5 - 1
        contrast = (fronts - backs[:, None]).repeat_interleave(CHUNK, 1)  # [B, 12, 3]
        latents = torch.einsum("bcnthw,btc->bnthw", self.motions[rows].float(), contrast)
        latents += (backs @ self.weight_sum.T - self.offset)[:, :, None, None, None]
        return Batch(latents, prompts, second, self.begins[rows])
