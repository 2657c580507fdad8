"""Draw the curves of a training from the logs in .train/: the losses, and what first chunks show.

python -m tools.train_tiny.curve docs/images/tiny-training.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

from .loop import WORK
from .train_transformer import FRESH, GOING_ON

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

NUMBER = r"([-+.\d]+(?:e-?\d+)?)"


def read(log: Path, *names: str) -> tuple[list[int], list[list[float]]]:
    """Steps and values of the lines of a log that have all `names`, each with a number behind it."""
    steps, values = [], []
    for line in log.read_text(encoding="utf-8").splitlines():
        found = [re.search(rf"\b{re.escape(name)}:? {NUMBER}", line) for name in names]
        if all(found):
            steps.append(int(re.search(r"step (\d+)/", line)[1]))
            values.append([float(match[1]) for match in found])
    return steps, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--going-on", action="store_true", help="it began with the weights of an exported model")
    arguments = parser.parse_args()
    figure, (losses, shown, vae) = pyplot.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    losses.plot(*read(WORK / "transformer.log", "loss"))
    losses.set(title="transformer: loss", xlabel="steps")
    plan = GOING_ON if arguments.going_on else FRESH
    for step, text in ((plan.clips_from, "clips"), (plan.self_from, "own videos")):
        losses.axvline(step, color="0.8", zorder=0)
        losses.text(step, 0.98, f" {text}", transform=losses.get_xaxis_transform(), va="top", fontsize=8)
    steps, values = read(WORK / "transformer.log", "shape", "colour", "direction")
    for name, row in zip(("shape", "colour", "direction"), zip(*values)):
        shown.plot(steps, row, label=name)
    shown.set(title="transformer: right in first chunks, plain prompts", xlabel="steps", ylim=(0, 1.02))
    shown.legend(fontsize=8)
    steps, values = read(WORK / "decoder.log", "psnr")
    vae.plot(steps, values)
    vae.set(title="decoder: PSNR, dB", xlabel="steps")
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
