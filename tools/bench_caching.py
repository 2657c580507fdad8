"""`python -m rolling_kv bench caching` on the bundled model, with what its detector sees in the decoded videos.

    python -m tools.bench_caching [any argument of `python -m rolling_kv bench caching`]

The prompt must be one of the tiny world, such as "a red circle moving left". Two columns are added: the share of frames
that show the shape in its colour, and the share of videos in which it moves in its direction.
"""

from __future__ import annotations

import argparse
import re
import sys

import torch
from diffusers.utils import logging

from rolling_kv.bench.caching import add_arguments, main

from .train_tiny.detector import detect, direction
from .train_tiny.world import COLOURS, DIRECTIONS, SHAPES


def judge_of(prompt: str):
    """A judge of videos of this prompt; see `rolling_kv.bench.caching.measure`. Raises ValueError for other prompts."""
    names = "|".join(COLOURS), "|".join(SHAPES)
    found = re.search("({}) ({}).* (up|down|left|right)( and left| and right)?".format(*names), prompt)
    if found is None or found[3] + (found[4] or "") not in DIRECTIONS:
        raise ValueError(f"the detector knows prompts such as 'a red circle moving left', not {prompt!r}")
    colour, shape, way = found[1], found[2], found[3] + (found[4] or "")

    def judge(frames: torch.Tensor) -> dict[str, float]:
        seen = detect(frames)
        right = [p and c == colour and s == shape for p, c, s in zip(seen.present.tolist(), seen.colour, seen.shape)]
        # The first second: later the shape may have bounced off a wall.
        return {"right frames": sum(right) / len(right), "right way": float(direction(seen.position[:16]) == way)}

    return judge


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_caching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()
    logging.set_verbosity_error()
    try:
        main(args, judge_of(args.prompt))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("cancelled")
