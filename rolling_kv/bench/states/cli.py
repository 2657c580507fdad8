"""`python -m rolling_kv bench states`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse

from .. import options, subject
from ..figures import write_json
from .experiment import StateExperiment
from .report import as_json, tables
from .run import measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser, chunks=10)
    parser.add_argument("--runs", type=int, default=5, help="of a chain (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for what cannot work."""
    options.check(args, "chunks", "repeats")
    with options.threads(args.threads):
        experiment = make_experiment(args)
        print(experiment.describe(), flush=True)
        results = measure(experiment, say=lambda text: print(f"  {text}", flush=True))
        print(f"\n{tables(experiment, results)}")
        if args.json:
            write_json(args.json, as_json(experiment, results))


def make_experiment(args: argparse.Namespace) -> StateExperiment:
    """What to measure."""
    return StateExperiment(**subject.fields_of(args), runs=args.runs)
