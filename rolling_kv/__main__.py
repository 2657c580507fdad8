"""`python -m rolling_kv`. The commands take seconds to import: whatever ends the process is provided for before that."""

from __future__ import annotations

import io
import signal
import sys

ENDING = ("SIGTERM", "SIGHUP", "SIGBREAK")
"""Signals that end a process, as far as the system has them: a service stops, a terminal closes."""


def main() -> None:
    """Run the command line with the arguments of the process."""
    for number in (getattr(signal, name) for name in ENDING if hasattr(signal, name)):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup it is ignored, and stays so
            signal.signal(number, _end)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may have characters that the code page lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit("cancelled; nothing was written")


def _run() -> None:
    from .cli import main

    main()


def _end(number: int, frame) -> None:
    """Leave every block on the way out, as after Ctrl-C, so that nothing unfinished stays behind."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
