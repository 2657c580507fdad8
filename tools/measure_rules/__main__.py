"""Measure what the rules of the cache do to the bundled model.

    python -m tools.measure_rules switch --out .train/rules --seeds 10
    python -m tools.measure_rules long --out .train/rules --seeds 3
    python -m tools.measure_rules long --out .train/rules --seeds 3 --seconds 300
    python -m tools.measure_rules summary --out .train/rules
    python -m tools.measure_rules report

Runs that are in the folder already are not made again, so what was interrupted goes on. `summary` reads the runs and writes
measured.json here and the pictures in docs/images; `report` writes the tables of docs/models.md from measured.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import report, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("switch", "long", "summary", "report"))
    parser.add_argument("--out", type=Path, default=Path(".train/rules"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="videos of each rule, with seeds from 0 on")
    parser.add_argument("--seconds", type=float, default=60, help="length of the long videos")
    parser.add_argument("--at-once", type=int, default=5, help="videos that are sampled side by side")
    parser.add_argument("--only", nargs="*", default=[], help="names of rules; all of them unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "report":
        report.write_tables()
    elif arguments.what == "summary":
        report.summarise(arguments.out)
    else:
        kind = "switch" if arguments.what == "switch" else f"long-{arguments.seconds:g}"
        seeds = list(range(arguments.seeds))
        sample.run(kind, arguments.out, seeds, arguments.at_once, arguments.seconds, arguments.only)


if __name__ == "__main__":
    main()
