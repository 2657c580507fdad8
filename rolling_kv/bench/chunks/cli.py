"""`python -m rolling_kv bench`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...config import CacheConfig
from ...options import add_cache, add_execution, cache_of, execution_of
from .. import options
from ..figures import hardware, write_json
from ..random_model import SIZES
from .contenders import Contender, Recompute, Rolling
from .experiment import Workload
from .floor import Floor
from .growing import Growing
from .report import as_json, tables, write_plot
from .run import measure

CONTENDERS = (Rolling, Floor, Recompute, Growing)
"""In the order in which they take turns: the floor right after what is compared with it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = "pixels, a multiple of 16 (default: the size's)"
    parser.add_argument("--size", choices=SIZES, default="tiny", help="shape of the model (default: %(default)s)")
    parser.add_argument("--height", type=int, help=size)
    parser.add_argument("--width", type=int, help=size)
    parser.add_argument("--chunks", type=int, default=10, help="chunks to make, of 3 latent frames (default: 10)")
    options.add_dtype(parser)
    add_cache(parser, "the size's, and Self-Forcing's", note="; (a) only", switches=False)
    add_execution(parser, note="; (a) only")
    parser.add_argument("--methods", help="letters of the methods, such as ae (default: all that can run here)")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs (default: %(default)s)")
    options.add_machine(parser)
    parser.add_argument("--plot", type=Path, metavar="F", help="draw seconds and memory by chunk into this PNG file")


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for arguments that cannot work."""
    workload = make_workload(args)
    options.check(args, "repeats")
    with options.threads(args.threads), comfyui_sampler(workload, args.methods) as (sampler, note):
        contenders = choose(args.methods, CONTENDERS + ((sampler,) if sampler else ()))
        described = describe(args, workload)
        print(described)
        # What is compiled on the first chunks, or set up in CUDA's libraries, is not what is measured.
        warmup = 2 if workload.execution.compile or workload.device.type == "cuda" else 0
        results = measure(workload, contenders, repeats=args.repeats, warmup=warmup, memory=not args.no_memory)
        print(f"\n{tables(workload, results)}")
        if note:
            print(note)
        if args.json:
            write_json(args.json, as_json(_plain(args), workload, results))
        if args.plot:
            write_plot(args.plot, described, workload, results)


@contextmanager
def comfyui_sampler(workload: Workload, letters: str | None) -> Iterator[tuple[type[Contender] | None, str]]:
    """(d), ComfyUI's own sampler, and a note for the reader: why it is left out, or empty. letters: of --methods.

    It needs another process, which the published pack never starts: it is in the folder `tools` of the source.
    Raises ValueError if (d) was asked for and cannot run.
    """
    wanted = letters is None or "d" in letters
    source = Path(__file__).parents[3] / "tools" / "comfyui" / "sampler.py"
    with ExitStack() as stack:
        sampler, why_not = None, "it is part of the source repository only"
        if wanted and source.is_file():
            try:
                tools = importlib.import_module("tools.comfyui.sampler")
            except ImportError:
                why_not = f"the command has to run in {source.parents[2]}"
            else:
                sampler, why_not = stack.enter_context(tools.find_sampler(workload))
        if letters is not None and wanted and sampler is None:
            raise ValueError(f"(d) cannot be measured: {why_not}")
        yield sampler, f"(d) was not measured: {why_not.rstrip('.')}." if wanted and sampler is None else ""


def make_workload(args: argparse.Namespace) -> Workload:
    size = SIZES[args.size]
    return Workload(
        size, args.height or size.height, args.width or size.width, args.chunks,
        cache_of(args, CacheConfig(size.window)), dtype=options.dtype_of(args), device=args.device,
        execution=execution_of(args),
    )  # fmt: skip


def choose(letters: str | None, available: Sequence[type[Contender]]) -> list[type[Contender]]:
    """The contenders with those letters, in the order in which they take turns."""
    known = {contender.letter: contender for contender in available}
    wanted = known.keys() if letters is None else set(letters.replace(",", ""))
    unknown = sorted(wanted - known.keys())
    if unknown or not wanted:
        choices = ", ".join(f"{letter} ({contender.title})" for letter, contender in sorted(known.items()))
        raise ValueError(f"--methods takes letters of {choices}; got {letters!r}")
    return [contender for letter, contender in known.items() if letter in wanted]


def describe(args: argparse.Namespace, workload: Workload) -> str:
    chosen = [f"cache in {args.cache_storage}"] * (args.cache_storage != "model")
    chosen += ["cache offloaded"] * args.offload_cache + workload.execution.describe()
    return (
        f"{args.size}: {workload.size.describe()}; "
        f"{workload.height}x{workload.width}, {str(workload.dtype).removeprefix('torch.')}"
        f"{''.join(', ' + option for option in chosen)}\n{hardware(workload.device)}"
    )


def _plain(args: argparse.Namespace) -> dict:
    """The arguments as JSON takes them."""
    plain = (bool, int, float, str, type(None))
    known = {name: value for name, value in vars(args).items() if not callable(value)}
    return {name: value if isinstance(value, plain) else str(value) for name, value in known.items()}
