"""Memory of this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LIMIT_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that runs in it where that has less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control groups of version 2, or "max": no limit
        memory = min(memory, int(LIMIT_OF_CONTAINER.read_text()))
    return memory
