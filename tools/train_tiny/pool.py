"""Training clips of the transformer: a pool of motions in code space, painted in random colours when they are drawn.

It keeps the code of the coverage alone, so a clip in any colours, also with a change of colour, costs nothing to make.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import NamedTuple

import torch

from .code import TIME, LinearCode
from .prompts import describe
from .world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SMALLER,
    SPEEDS,
    Scene,
    Track,
    backdrop,
    chance,
    covered,
    latent_places,
    look_numbers,
    moved,
    other_shapes,
    pick,
    random_scene,
    random_start,
)

LATENT_FRAMES = 12
CHUNK = 3
CHUNKS = LATENT_FRAMES // CHUNK
RESHAPED, RETIMED, RECOLOURED, REPAINTED = 0.25, 0.3, 0.5, 0.3
"""Shares of the changes that a later prompt makes: another shape, speed, colour, background."""
STILL = 0.2
"""Share of the motions that begin with a shape that stands still: twice as many as are measured, for it is hard to stay."""
CHANGED = 0.6
"""Share of the motions that another prompt may change."""


class Batch(NamedTuple):
    """latents [B, 16, 12, 8, 8]; ways [7, B, 16, 12, 8, 8]: from there to the other two shapes, and to its own SMALLER and `moved`; prompts: two for
    each clip; second [B, 4]: chunks that follow the second prompt. looks [B, 4, 4], places [B, 12, 2]: see `facts`."""

    latents: torch.Tensor
    ways: torch.Tensor
    prompts: list[tuple[str, str]]
    second: torch.Tensor
    looks: torch.Tensor
    places: torch.Tensor


def changed(scene: Scene, generator: torch.Generator, kinds: frozenset[str]) -> tuple[Scene, frozenset[str]]:
    """The scene as another prompt changes it, and which attributes that prompt has to say.

    kinds: which of "shape", "speed", "colour" and "background" may change.
    """
    shares = {"shape": RESHAPED, "speed": RETIMED, "colour": RECOLOURED, "background": REPAINTED}
    choices = {"shape": SHAPES, "speed": SPEEDS, "colour": COLOURS, "background": BACKGROUNDS}
    new = {
        name: pick([value for value in choices[name] if value != getattr(scene, name)], generator)
        for name, share in shares.items()
        if name in kinds and chance(generator) < share
    }
    if "speed" in new and scene.speed != "still" and chance(generator) < 0.4:
        new["speed"] = "still"
    # What the prompt says of the direction counts where the shape stood; elsewhere the frames before it know better.
    starts = "speed" in new and scene.speed == "still"
    turned = {"direction": pick(DIRECTIONS, generator)} if starts or chance(generator) < 0.4 else {}
    return replace(scene, **new, **turned), frozenset(new) | ({"direction"} if starts else frozenset())


class Pool:
    """`motions` [N, 3, 16, 12, 8, 8] in float16: the code of the coverage for each colour channel. `paths` [N, 48, 2].

    scenes, then: what is seen before and from chunk `border` on, where they differ; 0 where no chunk does.
    """

    def __init__(
        self,
        motions: torch.Tensor,
        scenes: list[Scene],
        then: list[Scene],
        must: list[frozenset[str]],
        border: torch.Tensor,
        paths: torch.Tensor,
        code: LinearCode,
    ):
        self.motions, self.scenes, self.then, self.must, self.border = motions, scenes, then, must, border
        self.paths, self.code = paths, code

    @classmethod
    def make(cls, code: LinearCode, clips: int, seed: int = 3) -> Pool:
        generator = torch.Generator().manual_seed(seed)
        motions, scenes, after, musts, borders, paths = [], [], [], [], [], []
        for _ in range(clips):
            scene = random_scene(generator, still=STILL)
            # Half of the clips begin the video: its first frame counts as four.
            late = chance(generator) < 0.5
            first = 1 + int(torch.randint(240, (), generator=generator)) if late else -3
            border = int(torch.randint(1, CHUNKS, (), generator=generator)) if chance(generator) < CHANGED else 0
            then, must = changed(scene, generator, frozenset({"shape", "speed"})) if border else (scene, frozenset())
            track = Track([scene], torch.tensor([random_start(scene, generator)]))
            times = first + torch.arange(4 * LATENT_FRAMES, dtype=torch.float32)
            cut = 4 * CHUNK * border if border else len(times)
            path = track.at(times[:cut].clamp_min(0))
            if border:
                track.turn([then], float(times[cut - 1]))
                path = torch.cat([path, track.at(times[cut:])], 1)
            pieces = (scene.shape, slice(0, cut)), (then.shape, slice(cut, None))
            inside = torch.cat([covered([shape], [scene.size], path[:, part]) for shape, part in pieces], 1)
            motions.append(code.cover(inside)[0].half())
            paths.append(path[0])
            scenes.append(scene)
            after.append(then)
            musts.append(must)
            borders.append(border)
        return cls(torch.stack(motions), scenes, after, musts, torch.tensor(borders), torch.stack(paths), code)

    def state(self) -> dict:
        rows = [[list(asdict(s).values()) for s in scenes] for scenes in (self.scenes, self.then)]
        must = list(map(sorted, self.must))
        return {"motions": self.motions, "scenes": rows, "must": must, "border": self.border, "paths": self.paths}

    @classmethod
    def from_state(cls, state: dict, code: LinearCode) -> Pool:
        scenes, then = ([Scene(*values) for values in row] for row in state["scenes"])
        must = list(map(frozenset, state["must"]))
        return cls(state["motions"], scenes, then, must, state["border"], state["paths"], code)

    def draw(self, count: int, generator: torch.Generator, striped: bool = False) -> Batch:
        """`count` clips in random colours, with prompts for them; striped: in that style."""
        rows = torch.randint(len(self.scenes), (count,), generator=generator)
        second = torch.arange(CHUNKS) >= torch.where(self.border[rows] > 0, self.border[rows], CHUNKS)[:, None]
        fronts, backs, prompts, looks = torch.empty(count, 2, 3), torch.empty(count, 2, 8, 3), [], []
        for index, row in enumerate(rows.tolist()):
            look = random_scene(generator)
            first = replace(self.scenes[row], colour=look.colour, background=look.background, striped=striped)
            then = replace(self.then[row], colour=look.colour, background=look.background, striped=striped)
            direction = then.direction
            then, must = changed(then, generator, frozenset({"colour", "background"}))
            then = replace(then, direction=direction)
            fronts[index] = torch.tensor([COLOURS[first.colour], COLOURS[then.colour]]) / 127.5 - 1
            backs[index] = backdrop([first, then])
            looks.append(torch.stack([look_numbers(first), look_numbers(then)]))
            prompt, _ = describe(first, generator)
            prompts.append((prompt, describe(then, generator, must=must | self.must[row])[0]))
        pick_chunks = second.repeat_interleave(CHUNK, 1).long()  # [B, 12]
        clips = torch.arange(count)[:, None]
        fronts, backs = fronts[clips, pick_chunks], backs[clips, pick_chunks]  # [B, 12, 3], [B, 12, 8, 3]
        latents = self.code.paint(self.motions[rows].float(), fronts, backs)
        later = pick_chunks.repeat_interleave(TIME, 1)[..., None, None] > 0
        inside = []
        for turn, share in (*((turn, 1.0) for turn in range(len(SHAPES))), (0, SMALLER)):
            before, after = (
                covered(
                    [(scene.shape, *other_shapes(scene.shape))[turn] for scene in scenes],
                    [scene.size for scene in scenes],
                    self.paths[rows],
                    share,
                )
                for scenes in ([self.scenes[row] for row in rows], [self.then[row] for row in rows])
            )
            inside.append(torch.where(later, after, before))
        own, *others = inside
        others += (own + moved(own, CHUNK * TIME)).unbind()
        ways = [self.code.paint(self.code.cover(other), fronts, backs) - latents for other in others]
        looks = torch.stack(looks)[clips, second.long()]
        return Batch(latents, torch.stack(ways), prompts, second, looks, latent_places(self.paths[rows]))
