"""`python -m rolling_kv bench decode`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from ...geometry import WAN_21
from ...vae.loading import load_vae
from ...vae.taehv import load_taehv
from ...vae.wan import WanVAE
from .. import options
from ..figures import hardware, machine, markdown, number, ratios, size, write_json
from ..kinds import KINDS, OTHER
from ..random_model import VAE_SIZES, random_taehv, random_vae
from .run import DecodeExperiment, DecodeResult, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, metavar="F", help="Wan 2.1's VAE (default: random weights)")
    parser.add_argument("--taehv", type=Path, metavar="F", help="taew2_1 (default: random weights)")
    add_vae_size(parser)
    parser.add_argument("--height", type=int, help="pixels (default: 480; 64 for the tiny width)")
    parser.add_argument("--width", type=int, help="pixels (default: 832; 64 for the tiny width)")
    options.add_dtype(parser)
    parser.add_argument("--repeats", type=int, default=6, help="timed latent frames (default: %(default)s)")
    options.add_machine(parser, memory=False)


def add_vae_size(parser: argparse.ArgumentParser) -> None:
    """The option for the width of a random VAE."""
    parser.add_argument(
        "--vae-size", choices=VAE_SIZES, help="width of a VAE with random weights (default: full on CUDA, else tiny)"
    )


def vae_size_of(args: argparse.Namespace) -> str:
    return args.vae_size or ("full" if args.device.type == "cuda" else "tiny")


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "repeats")
    with options.threads(args.threads):
        experiment, name = make_experiment(args)
        print(f"{name}; {experiment.height}x{experiment.width}\n{hardware(args.device)}", flush=True)
        results = measure(experiment, say=lambda text: print(f"  {text}", flush=True))
        print("\n" + "\n".join(table(results)))
        if args.json:
            figures = {"machine": machine(args.device), "setting": name, "ways": as_rows(results)}
            write_json(args.json, figures | {"height": experiment.height, "width": experiment.width})


def make_experiment(args: argparse.Namespace) -> tuple[DecodeExperiment, str]:
    """What to measure, and the name of the VAE for people."""
    dtype, width = options.dtype_of(args), vae_size_of(args)
    if args.vae is None:
        vae, name = random_vae(width, dtype, args.device), f"VAE of width {VAE_SIZES[width]}, random weights, {dtype}"
    else:  # in float32 it stays as diffusers has it
        loaded = load_vae(args.vae, dtype="float32", device=args.device, geometry=WAN_21)
        if not isinstance(loaded, WanVAE):
            raise ValueError(f"--vae takes Wan's VAE, and {args.vae} is a tiny decoder: give it with --taehv")
        vae = loaded.vae
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(dtype)
        width, name = "full", f"{args.vae.name}, {dtype}"
    tiny = random_taehv(dtype, args.device) if args.taehv is None else load_taehv(args.taehv, WAN_21, args.device)
    height, across = (480, 832) if width == "full" else (64, 64)
    return DecodeExperiment(vae, tiny, args.height or height, args.width or across, args.repeats), name


def as_rows(results: list[DecodeResult]) -> list[dict]:
    """Everything measured, a row for each way, the stock VAE first."""
    first, rows = results[0], []
    for result in results:
        found = {name: getattr(result, name) for name in ("way", "announced", "peak", "difference", "times")}
        beside = ratios((result.times, result.times), (first.times, first.times))
        found |= {name: beside[name] for name in ("times_the_first", "least", "most")}
        kernels = result.kernels and result.kernels._asdict()
        rows.append(found | {"seconds": median(result.times), "kernels": kernels})
    return rows


def table(results: list[DecodeResult]) -> list[str]:
    """Time and bytes of a latent frame, and its time by kind of kernel."""
    rows, kinds = as_rows(results), [*KINDS, OTHER]
    return [
        *markdown(
            ["decoder", "ms a latent frame", "times the first", "from least to most", "announced", "in use", "difference"],
            [
                [
                    row["way"], f"{row['seconds'] * 1e3:.1f}", f"{row['times_the_first']:.3f}",
                    f"{row['least']:.3f} to {row['most']:.3f}", size(row["announced"]), size(row["peak"]),
                    f"{row['difference']:.1e}",
                ]
                for row in rows
            ],
        ),
        "",
        *markdown(
            ["ms by kind", *kinds],
            [[row["way"], *(number(row["kernels"]["kinds"].get(kind), ".2f") for kind in kinds)] for row in rows],
        ),
    ]  # fmt: skip
