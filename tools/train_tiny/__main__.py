"""Everything, in order: `python -m tools.train_tiny`. Stop it at any time; the same command goes on where it stopped.

Checkpoints and logs are in .train/. Decoder, encoder and transformer do not depend on each other, so on several cores they
can also run side by side, each from its own module: see docs/tiny-model.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import fit_preview
from . import teacher
from .export import export
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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="with a C++ compiler: somewhat less time per step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        teacher.compile_blocks()
    former = arguments.former
    code, steps = linear_code(former), STEPS_ON if former else STEPS
    train_decoder(code, steps["decoder"], former)
    train_encoder(code, steps["encoder"], former)
    train_transformer(former)
    polish()
    train_lora()
    export(arguments.folder)
    fit_preview.write(arguments.folder)


if __name__ == "__main__":
    main()
