"""Where what a command shows goes: log lines to stderr, from `info` on rank 0, warnings elsewhere.

Invariant: a display that fails (a pipe that nobody reads, a full disk, a closed stderr) ends no command.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any, TextIO

from trainer.distributed.topology import Topology


class Display:
    """A stream of text that takes what is written after it has failed, and says once on stderr that it did.

    A pipe that was closed is not spoken of where what was read is the result: who closes it has seen enough.
    """

    def __init__(self, stream: TextIO, name: str, *, is_result: bool) -> None:
        self._stream, self._name, self._is_result = stream, name, is_result
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write; replace what the encoding of the terminal cannot say."""
        if self.error is None:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError as error:
                return self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        if self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        self.error = error
        with suppress(OSError, ValueError):  # Python writes what is held back once more when it ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._name != "stderr" and not (self._is_result and isinstance(error, BrokenPipeError)):
            reason = getattr(error, "strerror", None) or error
            print(f"trainer: note: {self._name} cannot be written ({reason}): nothing more is shown", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def display_that_may_fail(*, is_result: bool) -> Iterator[Display]:
    """Replace stdout and stderr by displays whose writes do not raise; yield that of stdout.

    Args:
        is_result: what is shown is what the command is there for, unlike the progress of a run.
    """
    _open_closed_streams()
    before = sys.stdout, sys.stderr
    shown = Display(sys.stdout, "stdout", is_result=is_result)
    sys.stdout, sys.stderr = shown, Display(sys.stderr, "stderr", is_result=is_result)
    try:
        yield shown
        shown.flush()
    finally:
        sys.stdout, sys.stderr = before


def _open_closed_streams() -> None:
    """Open what the caller closed (`2>&-`) onto nothing: the next file would get its number, and what is said there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115  as Python's own


class _StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is when a line is logged: tests and notebooks exchange it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        """The present stderr."""
        return sys.stderr


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether options are to be listed instead of used."""
    return any(word in ("-h", "--help", "--help-all") for word in words)


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
        with warnings.catch_warnings():
            # PEFT asks transformers for a name that is to be removed: nothing that whoever runs a command can change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
