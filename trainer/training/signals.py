"""Ctrl-C and SIGTERM become a request that the loop honours after the running step, on all ranks together."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers the first stop signal while it is entered; a second one ends the process as it would without us."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def as_flags(self) -> dict[str, float]:
        """Give one 0 or 1 for each signal, to be summed over ranks."""
        return {_flag(number): float(self.signal == number) for number in SIGNALS}

    def agreed(self, totals: dict[str, float]) -> int | None:
        """Give the signal that reached some rank, from the summed flags."""
        return next((int(number) for number in SIGNALS if totals[_flag(number)] > 0), None)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _flag(number: signal.Signals) -> str:
    return f"stopped_by_{number.name}"
