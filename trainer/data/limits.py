"""A limit for work that might never end, such as a chat template with a loop.

Must not know what the work is. Invariant: afterwards the process has the alarm and the handler it had before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_is_running = False


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what is still at work after so long; only in a main thread, where Python hears signals.

    Within another limit only its clock is set back: one for many pieces of work is much cheaper than one for each.
    """
    global _is_running
    if threading.current_thread() is not threading.main_thread():
        yield
    elif _is_running:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    else:

        def stop(number: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"it was still at work after {seconds} s")

        handler = signal.signal(signal.SIGALRM, stop)
        timer = signal.setitimer(signal.ITIMER_REAL, seconds)
        _is_running = True
        try:
            yield
        finally:
            _is_running = False
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)
