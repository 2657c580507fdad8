"""The arguments of `python -m rolling_kv bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..attention import ATTENTION_BACKENDS
from ..config import STORAGES, CacheConfig
from . import caching_cli, storage_cli
from .floor import Floor
from .measure import measure
from .methods import Growing, Method, Recompute, Rolling
from .report import as_json, check_plot, machine, tables, write_json, write_plot
from .workload import SIZES, Workload

METHODS = (Rolling, Floor, Recompute, Growing)
"""In the order in which they take turns: the floor right after what is compared with it."""


def add_command(commands) -> None:
    """Add `bench` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "bench",
        help="measure the time and memory of the rolling cache, and of other ways to the same chunks",
        epilog="`python -m tools.bench`, in the source repository, measures ComfyUI's own sampler beside these.",
    )
    parser.set_defaults(run=run)
    add_arguments(parser)
    more = parser.add_subparsers(metavar="[caching | storage]", required=False)
    steps = more.add_parser("caching", help="measure every step cache at several strengths, in time and quality")
    steps.set_defaults(run=caching_cli.main)
    caching_cli.add_arguments(steps)
    storage = more.add_parser("storage", help="measure every way to keep the cache and the weights: bytes, time, error")
    storage.set_defaults(run=storage_cli.main)
    storage_cli.add_arguments(storage)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = "pixels, a multiple of 16 (default: the size's)"
    parser.add_argument("--size", choices=SIZES, default="tiny", help="shape of the model (default: %(default)s)")
    parser.add_argument("--height", type=int, help=size)
    parser.add_argument("--width", type=int, help=size)
    parser.add_argument("--window", type=int, help="latent frames a chunk attends to, -1 for all (default: the size's)")
    parser.add_argument("--sink", type=int, default=0, help="first latent frames that never leave the window; (a) only")
    parser.add_argument("--chunks", type=int, default=10, help="chunks to make, of 3 latent frames (default: 10)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--cache-storage", choices=STORAGES, default="model", help="how (a) keeps its cache")
    parser.add_argument("--offload-cache", action="store_true", help="keep the cache in CPU memory; (a) only")
    parser.add_argument("--compile", action="store_true", help="torch.compile; (a) only")
    parser.add_argument("--cuda-graphs", action="store_true", help="record passes as CUDA graphs; (a) only")
    parser.add_argument("--backend", choices=ATTENTION_BACKENDS, help="attention backend; (a) only")
    parser.add_argument("--methods", help="letters of the methods, such as ae (default: all that can run here)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="without CUDA: leave out the runs that follow memory")
    parser.add_argument("--json", type=Path, metavar="F", help="write all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw seconds and memory by chunk into this PNG file")


def run(args: argparse.Namespace, more: Sequence[type[Method]] = (), notes: Sequence[str] = ()) -> None:
    """Measure and print. more: methods beside METHODS. notes: lines for the reader, printed last.

    Raises ValueError, before anything is measured, for arguments that cannot work.
    """
    workload = make_workload(args)
    methods = choose_methods(args.methods, (*METHODS, *more))
    if args.repeats < 1 or args.threads is not None and args.threads < 1:
        raise ValueError(f"--repeats and --threads must be at least 1, got {args.repeats} and {args.threads}")
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist; make it first")
    if args.plot:
        check_plot(args.plot)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        described = describe(args, workload)
        print(described)
        # What is compiled on the first chunks, or set up in CUDA's libraries, is not what is measured.
        warmup = 2 if workload.compile or workload.device.type == "cuda" else 0
        results = measure(workload, methods, repeats=args.repeats, warmup=warmup, memory=not args.no_memory)
        print(f"\n{tables(workload, results)}")
        for note in notes:
            print(note)
        if args.json:
            write_json(args.json, as_json(_plain(args), workload, results))
        if args.plot:
            write_plot(args.plot, described, workload, results)
    finally:
        torch.set_num_threads(threads)


def make_workload(args: argparse.Namespace) -> Workload:
    size = SIZES[args.size]
    device = torch.device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    window = size.window if args.window is None else args.window
    return Workload(
        size, args.height or size.height, args.width or size.width, args.chunks,
        CacheConfig(window, args.sink, storage=args.cache_storage, offload=args.offload_cache),
        dtype=getattr(torch, dtype), device=device, compile=args.compile, cuda_graphs=args.cuda_graphs,
        backend=args.backend,
    )  # fmt: skip


def choose_methods(letters: str | None, available: Sequence[type[Method]]) -> list[type[Method]]:
    """The methods with those letters, in the order in which they take turns."""
    known = {method.letter: method for method in available}
    wanted = known.keys() if letters is None else set(letters.replace(",", ""))
    unknown = sorted(wanted - known.keys())
    if unknown or not wanted:
        choices = ", ".join(f"{letter} ({method.title})" for letter, method in sorted(known.items()))
        raise ValueError(f"--methods takes letters of {choices}; got {letters!r}")
    return [method for letter, method in known.items() if letter in wanted]


def describe(args: argparse.Namespace, workload: Workload) -> str:
    size, here = workload.size, machine(workload.device)
    cpu = f"{here['cpu']}, {here['threads']} threads"
    options = [f"cache in {args.cache_storage}"] * (args.cache_storage != "model")
    options += ["cache offloaded"] * args.offload_cache + ["compiled"] * args.compile
    options += ["CUDA graphs"] * args.cuda_graphs
    options += [f"attention by {args.backend}"] if args.backend else []
    return (
        f"{args.size}: {size.layers} layers, dim {size.dim}, {size.heads} heads, ffn {size.ffn}, random weights; "
        f"{workload.height}x{workload.width}, {str(workload.dtype).removeprefix('torch.')}"
        f"{''.join(', ' + option for option in options)}\n{here.get('gpu', cpu)}, torch {here['torch']}"
    )


def _plain(args: argparse.Namespace) -> dict:
    known = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {name: value for name, value in known.items() if not callable(value)}
