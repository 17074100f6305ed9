"""Limits on work that might never end or take all memory, such as rendering a chat template.

Afterwards the process has the alarm, the signal handler and the memory limit that it had before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_is_running = False


@contextmanager
def limited_work(seconds: float, num_bytes: int | None = None) -> Iterator[None]:
    """Raise TimeoutError in work that lasts longer, MemoryError in work that allocates more.

    Only in the main thread, the only one in which Python handles signals. Within another limit only the clock is set
    back: one limit for many pieces of work is much cheaper than one for each.
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
            with _limited_memory(num_bytes):
                yield
        finally:
            _is_running = False
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)


@contextmanager
def _limited_memory(num_bytes: int | None) -> Iterator[None]:
    """Limit the growth of the address space inside, on Linux.

    A single operation that runs in C, such as "x" * 2_000_000_000, cannot be interrupted by the alarm, but it fails at
    once when it cannot allocate.
    """
    size_file = Path("/proc/self/statm")
    if num_bytes is None or not size_file.exists():
        yield
        return
    import resource

    allowed = int(size_file.read_text().split()[0]) * resource.getpagesize() + num_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        allowed = min(allowed, soft)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
