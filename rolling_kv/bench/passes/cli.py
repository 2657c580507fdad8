"""`python -m rolling_kv bench passes`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse

from ...config import WEIGHT_STORAGES, CacheConfig, SamplingConfig
from ...options import add_cache, add_execution, add_offload, cache_of, execution_of
from .. import options
from ..chunks.experiment import Workload
from ..figures import hardware, machine, markdown, size, write_json
from ..kinds import Kernels
from ..random_model import SIZES
from .run import PassExperiment, PassResult, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="tiny", help="shape of the model (default: %(default)s)")
    parser.add_argument("--height", type=int, help="pixels (default: the size's)")
    parser.add_argument("--width", type=int, help="pixels (default: the size's)")
    parser.add_argument("--chunk", type=int, default=3, help="latent frames of a pass (default: %(default)s)")
    options.add_dtype(parser)
    parser.add_argument("--weight-storage", choices=WEIGHT_STORAGES, default="model", help="default: %(default)s")
    add_offload(parser)
    add_cache(parser, "the size's, and Self-Forcing's", switches=False)
    add_execution(parser)
    parser.add_argument("--repeats", type=int, default=10, help="timed passes (default: %(default)s)")
    options.add_machine(parser, memory=False)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "chunk", "repeats")
    with options.threads(args.threads):
        experiment = make_experiment(args)
        print(describe(args, experiment), flush=True)
        result = measure(experiment)
        print("\n" + "\n".join(tables(result)))
        if args.json:
            write_json(args.json, as_json(args, experiment, result))


def make_experiment(args: argparse.Namespace) -> PassExperiment:
    shape = SIZES[args.size]
    sampling, execution = SamplingConfig(chunk=args.chunk), execution_of(args)
    execution.check(args.device, weight_storage=args.weight_storage)
    if args.offload_weights:
        execution.check_offloaded()
    load = Workload(
        shape, args.height or shape.height, args.width or shape.width, 1, cache_of(args, CacheConfig(shape.window)),
        sampling, dtype=options.dtype_of(args), device=args.device, execution=execution,
    )  # fmt: skip
    return PassExperiment(load, args.weight_storage, args.repeats, args.offload_weights)


def describe(args: argparse.Namespace, experiment: PassExperiment) -> str:
    load = experiment.workload
    chosen = [f"weights in {experiment.weights}"] * (experiment.weights != "model")
    chosen += ["weights offloaded"] * experiment.offload
    chosen += [f"cache in {load.cache.storage}"] * (load.cache.storage != "model")
    chosen += ["cache offloaded"] * load.cache.offload + load.execution.describe()
    return (
        f"{args.size}: {load.size.describe()}; {load.height}x{load.width}, window {load.cache.window}, chunk "
        f"{load.sampling.chunk}, {', '.join([str(load.dtype).removeprefix('torch.'), *chosen])}\n{hardware(load.device)}"
    )


def tables(result: PassResult) -> list[str]:
    """Times, kinds of kernels, and bytes, as Markdown."""
    announced = result.announced
    kept = announced.cache + announced.prompts
    lines = [
        f"A step {result.step * 1e3:.2f} ms, a context pass {result.context * 1e3:.2f} ms; ready after {result.ready:.1f} s.",
        "",
        *markdown(
            ["bytes beside the weights", "announced", "real"],
            [
                ["keys and values", size(kept), size(result.held)],
                ["passes", size(announced.activations), size(result.peak - result.held)],
                ["together", size(announced.device), size(result.peak)],
            ],
        ),
        f"Announced: {announced.device / result.peak:.2f} times what was in use; the weights take {size(result.weights)}.",
    ]
    if result.kernels is not None:
        lines += ["", *kernel_table(result.kernels)]
    return lines


def kernel_table(kernels: Kernels) -> list[str]:
    """Where the time of one turn goes."""
    whole = sum(kernels.kinds.values()) or 1
    kinds = [[kind, f"{took:.2f}", f"{took / whole:.3f}"] for kind, took in kernels.kinds.items()]
    longest = [[f"`{name}`", f"{took:.2f}", f"{took / whole:.3f}"] for name, took in kernels.longest]
    return [
        *markdown(["kind", "ms", "share"], kinds),
        f"{kernels.launches} launches; the CPU has asked for all of it after {kernels.asked:.1f} ms.",
        "",
        *markdown(["kernel", "ms", "share"], longest),
    ]


def as_json(args: argparse.Namespace, experiment: PassExperiment, result: PassResult) -> dict:
    """Everything measured."""
    return {
        "setting": describe(args, experiment),
        "machine": machine(experiment.workload.device),
        "result": result._asdict()
        | {
            "announced": result.announced._asdict() | {"device": result.announced.device},
            "announced_times_real": result.announced.device / result.peak,
            "kernels": result.kernels and result.kernels._asdict(),
        },
    }
