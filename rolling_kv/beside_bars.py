"""What is logged while a progress bar is drawn, on lines of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def told_beside_bars() -> Iterator[None]:
    """Write the warnings of this package to the error output, each above whatever bars there are."""
    logger, handler = logging.getLogger(__package__), _AboveBars(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # what cannot be told ends no run
            self.handleError(record)
