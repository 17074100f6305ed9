"""Where the log lines of the package go while a command runs: to stderr, from `info` on rank 0, warnings elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

from trainer.distributed.topology import Topology


class _StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is when a line is logged: tests and notebooks exchange it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        """The present stderr."""
        return sys.stderr


def level_in(words: Sequence[str]) -> str:
    """Return what --log-level asks for; a wrong one is refused where all words are parsed."""
    level = "info"
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.replace("_", "-").partition("=")
        if flag == "--log-level":
            level = value if equals else after
    return level


@contextmanager
def logs_on_stderr(level: str) -> Iterator[None]:
    """Write log lines of this package to stderr from a level on, on rank 0; warnings alone on other ranks."""
    logger = logging.getLogger("trainer")
    known = logging.getLevelNamesMapping()
    before, wanted = logger.level, known.get(level.upper(), logging.INFO)
    rank = Topology.from_environment().rank
    handler = _StderrHandler()
    place = f"rank {rank}: " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {place}%(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(wanted if rank == 0 else max(wanted, logging.WARNING))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
