"""Memory of this machine, and how much of it this process has held. Imports nothing of torch."""

from __future__ import annotations

import os
import re
import resource
from contextlib import suppress
from pathlib import Path

LIMIT_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")
OWN_STATUS = Path("/proc/self/status")


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that runs in it where that has less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control groups of version 2, or "max": no limit
        memory = min(memory, int(LIMIT_OF_CONTAINER.read_text()))
    return memory


def peak_resident_bytes() -> int:
    """Return the most bytes of memory that this process has held at once."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", OWN_STATUS.read_text()):
            return int(found[1]) * 1024
    # Where there is no /proc. Linux would hand on through exec what the parent had held.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
