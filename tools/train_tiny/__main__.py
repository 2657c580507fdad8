"""Everything, in order, on two cores. Stop it at any time; the same command goes on where it stopped.

torchrun --nproc-per-node 2 -m tools.train_tiny --compile

Checkpoints and logs are in .train/. Two workers train the transformer together, and side by side what does not need each
other. `python -m tools.train_tiny` does it alone, with half of the examples in every step of the transformer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import fit_preview
from . import teacher
from .export import export
from .loop import join_workers, side_by_side
from .polish import polish
from .train_lora import train_lora
from .train_transformer import train_transformer
from .train_vae import STEPS, STEPS_ON, linear_code, train_decoder, train_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("models/tiny"), help="where the finished model goes")
    parser.add_argument(
        "--from", dest="former", type=Path, help="an exported model whose weights are the beginning; needs fewer steps"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--compile", action="store_true", help="with a C++ compiler: somewhat less time per step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        teacher.compile_blocks()
    former = arguments.former
    code, steps = linear_code(former), STEPS_ON if former else STEPS
    side_by_side(
        lambda: train_decoder(code, steps["decoder"], former),
        lambda: train_encoder(code, steps["encoder"], former),
    )
    train_transformer(former)
    side_by_side(polish, train_lora)
    if join_workers()[0] == 0:
        export(arguments.folder)
        fit_preview.write(arguments.folder)


if __name__ == "__main__":
    main()
