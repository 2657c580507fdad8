"""`python -m rolling_kv bench kernels`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse

import torch

from ...config import CacheConfig
from ...options import add_window
from .. import options
from ..chunks.experiment import Workload
from ..figures import hardware, machine, markdown, number, write_json
from ..random_model import SIZES
from .run import Attention, Product, measure_attention, measure_products


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="tiny", help="shape of the model (default: %(default)s)")
    parser.add_argument("--height", type=int, help="pixels (default: the size's)")
    parser.add_argument("--width", type=int, help="pixels (default: the size's)")
    add_window(parser, "the size's")
    options.add_dtype(parser)
    parser.add_argument("--repeats", type=int, default=20, help="timed turns of each (default: %(default)s)")
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "repeats")
    shape = SIZES[args.size]
    load = Workload(
        shape, args.height or shape.height, args.width or shape.width, 1, CacheConfig(args.window or shape.window),
        dtype=options.dtype_of(args), device=args.device,
    )  # fmt: skip
    if load.cache.unlimited:
        raise ValueError("kernels are measured with a full window: give --window a number of latent frames")
    with options.threads(args.threads), torch.inference_mode():
        print(
            f"kernels of {args.size} at {load.height}x{load.width}, {load.dtype}\n{hardware(load.device)}", flush=True
        )
        attention = measure_attention(load, args.repeats, say=_say)
        products = measure_products(load, args.repeats, say=_say)
    print("\n" + "\n".join(tables(attention, products)))
    if args.json:
        figures = {
            "attention": [row._asdict() for row in attention],
            "products": [row._asdict() for row in products],
        }
        write_json(args.json, {"machine": machine(load.device), "size": args.size, **figures})


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def tables(attention: list[Attention], products: list[Product]) -> list[str]:
    return [
        *markdown(
            ["attention", "frames", "ms", "ms, copied first", "TFLOP/s", "difference"],
            [
                [
                    row.backend, str(row.frames), number(row.milliseconds, ".3f"), number(row.packed, ".3f"),
                    number(row.tflops, ".1f"), row.error or number(row.difference, ".1e"),
                ]
                for row in attention
            ],
        ),
        "",
        *markdown(
            ["product", "ms", "TFLOP/s", "with GELU, ms", "as one kernel, ms", "float8, ms"],
            [
                [
                    " x ".join(map(str, row.shape)), f"{row.linear:.3f}", f"{row.tflops:.1f}", f"{row.linear_gelu:.3f}",
                    number(row.fused_gelu, ".3f"), number(row.float8, ".3f"),
                ]
                for row in products
            ],
        ),
    ]  # fmt: skip
