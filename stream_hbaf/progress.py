"""Announces a step of a command that takes longer than a second."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

LOG = logging.getLogger(__name__)  # which the command line always shows
ANNOUNCED_AFTER_S = 1.0


@contextmanager
def announced(step: str, *, after_s: float = ANNOUNCED_AFTER_S) -> Iterator[None]:
    """Log ``step``, such as "loading bundle x", if the block takes longer than ``after_s``."""
    timer = Timer(after_s, LOG.info, [step])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
