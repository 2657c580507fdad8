"""`python -m rolling_kv bench caching` on the bundled model, with what its detector sees in the decoded videos.

    python -m tools.bench_caching [any argument of `python -m rolling_kv bench caching`]

The prompt must be one of the tiny world, such as "a red circle moving left". Three columns are added: the share of frames
in which the shape has the right colour and the right form, and the share of videos in which it moves the right way. Give
--videos too: one video says little.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch
from diffusers.utils import logging

from rolling_kv.bench.step_caches.cli import add_arguments, main

from .train_tiny.detector import detect, direction
from .train_tiny.world import COLOURS, DIRECTIONS, SHAPES, SIDE, STRAIGHT_FRAMES


def judge_of(prompt: str) -> Callable[[torch.Tensor], dict[str, float]]:
    """A judge of videos of this prompt; see `rolling_kv.bench.step_caches.run.compare`. Raises ValueError for other prompts."""
    # The longer names first: "up and left" is not "up".
    names = ("|".join(sorted(known, key=len, reverse=True)) for known in (COLOURS, SHAPES, DIRECTIONS))
    found = re.search(r"\b({}) ({})\b.*? ({})\b".format(*names), prompt)
    if found is None:
        raise ValueError(f"the detector knows prompts such as 'a red circle moving left', not {prompt!r}")
    colour, shape, way = found.groups()

    def judge(frames: torch.Tensor) -> dict[str, float]:
        seen = detect(frames)
        count = len(seen.present)
        return {
            "colour right": sum(p and c == colour for p, c in zip(seen.present.tolist(), seen.colour)) / count,
            "shape right": sum(p and s == shape for p, s in zip(seen.present.tolist(), seen.shape)) / count,
            "direction right": float(direction(seen.position[:STRAIGHT_FRAMES]) == way),  # later it may have bounced
        }

    return judge


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_caching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()
    logging.set_verbosity_error()
    try:
        if {args.height, args.width} - {None, SIDE}:
            raise ValueError(f"the detector reads videos of {SIDE}x{SIDE} pixels: leave out --height and --width")
        main(args, judge_of(args.prompt))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("cancelled")
