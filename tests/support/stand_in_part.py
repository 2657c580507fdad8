"""In the place of a benchmark in a process of its own: does what its name says. Imports next to nothing."""

import json
import os
import signal
import time
from pathlib import Path


def work(command, log):
    """command: name, options, "--json", file. log: what it says goes there."""
    name, figures = command[0], Path(command[-1])
    if name in ("works", "fails late"):
        figures.write_text(json.dumps({"seen": command[1:-2]}))
    if name.startswith("fails"):
        Path(log).write_text("a line\nValueError: too small\n")
        raise SystemExit(1)
    if name == "hangs":
        time.sleep(600)
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
