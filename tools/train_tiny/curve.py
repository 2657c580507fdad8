"""Draw the curves of a training from the logs in .train/: the losses, and what first chunks show.

python -m tools.train_tiny.curve docs/images/tiny-training.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

from .loop import WORK
from .train_transformer import FRESH

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

NUMBER = r"([-+.\d]+(?:e-?\d+)?)"


def read(logs: list[Path], *names: str) -> tuple[list[int], list[list[float]]]:
    """Steps and values of the lines of logs that have all `names`, each with a number behind it; the steps go on from log to
    log."""
    steps, values, before = [], [], 0
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            found = [re.search(rf"\b{re.escape(name)}:? {NUMBER}", line) for name in names]
            if all(found):
                steps.append(before + int(re.search(r"step (\d+)/", line)[1]))
                values.append([float(match[1]) for match in found])
        before += length(log)
    return steps, values


def length(log: Path) -> int:
    """Steps that a log is of."""
    return int(re.search(r"step \d+/(\d+)", log.read_text(encoding="utf-8"))[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    figure, (losses, shown, vae) = pyplot.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    rounds = [*sorted(WORK.glob("transformer_*.log")), WORK / "transformer.log"]
    losses.plot(*read(rounds, "loss"))
    losses.set(title="transformer: loss", xlabel="steps")
    marks = {FRESH.clips_from: "clips", FRESH.self_from: "own videos"} if len(rounds) > 1 else {}
    for number in range(1, len(rounds)):
        marks[sum(map(length, rounds[:number]))] = "again"
    for step, text in marks.items():
        losses.axvline(step, color="0.8", zorder=0)
        losses.text(step, 0.98, f" {text}", transform=losses.get_xaxis_transform(), va="top", fontsize=8)
    steps, values = read(rounds, "shape", "colour", "direction")
    for name, row in zip(("shape", "colour", "direction"), zip(*values)):
        shown.plot(steps, row, label=name)
    shown.set(title="transformer: right in first chunks, plain prompts", xlabel="steps", ylim=(0, 1.02))
    shown.legend(fontsize=8)
    steps, values = read([WORK / "decoder.log"], "psnr")
    vae.plot(steps, values)
    vae.set(title="decoder: PSNR, dB", xlabel="steps")
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
