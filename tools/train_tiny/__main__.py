"""Everything, in order: `python -m tools.train_tiny`. Stop it at any time; the same command goes on where it stopped.

Checkpoints and logs are in .train/. The parts do not depend on each other, so on several cores they can also run side by
side, each from its own module: see docs/tiny-model.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import teacher
from .export import export
from .polish import polish
from .train_transformer import train_transformer
from .train_vae import STEPS as VAE_STEPS
from .train_vae import linear_code, train_decoder, train_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("models/tiny"), help="where the finished model goes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="with a C++ compiler: a quarter less time per step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        teacher.compile_blocks()
    code = linear_code()
    train_decoder(code, VAE_STEPS["decoder"])
    train_encoder(code, VAE_STEPS["encoder"])
    train_transformer()
    polish()
    export(arguments.folder)


if __name__ == "__main__":
    main()
