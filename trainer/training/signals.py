"""Signals to stop or to save become requests that the loop honours after the running step, on all ranks together."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

UNLESS_USED = (signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2)  # stop, where nohup or a handler has no other use
SIGNALS = (signal.SIGINT, signal.SIGTERM, *UNLESS_USED)  # stop
SAVE_SIGNAL = signal.SIGUSR1  # save, and go on
_SAVE = "asked_to_save"
_FLAGS = {number: f"stopped_by_{number.name}" for number in SIGNALS}


class StopRequest:
    """Remembers the first stop signal while it is entered; a second one ends the process as it would without us.

    With `saves`, it also remembers that a checkpoint was asked for.
    """

    def __init__(self, *, saves: bool = False) -> None:
        self.signal: int | None = None
        self.is_save_asked = self._is_save_told = False
        self._saves = saves
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            used = {number for number in UNLESS_USED if signal.getsignal(number) is not signal.SIG_DFL}
            self._previous = {n: signal.signal(n, self._remember) for n in SIGNALS if n not in used}
            if self._saves:
                self._previous[SAVE_SIGNAL] = signal.signal(SAVE_SIGNAL, self._remember_to_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def as_flags(self) -> dict[str, float]:
        """Return a 0 or 1 for each signal, to be summed over ranks."""
        self._is_save_told = self.is_save_asked
        flags = {name: float(self.signal == number) for number, name in _FLAGS.items()}
        flags[_SAVE] = float(self._is_save_told)
        return flags

    def agreed(self, totals: dict[str, float]) -> tuple[int | None, bool]:
        """Return the stop signal that reached some rank, and whether some rank was asked to save.

        Args:
            totals: the flags of `as_flags`, summed over ranks. A request to save that was among them is done with.
        """
        self.is_save_asked = self.is_save_asked and not self._is_save_told
        reached = [int(number) for number, name in _FLAGS.items() if totals[name] > 0]
        return (reached[0] if reached else None), totals[_SAVE] > 0

    def _remember_to_save(self, number: int, frame: FrameType | None) -> None:
        self.is_save_asked = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
