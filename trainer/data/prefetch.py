"""The next item while the present one is worked on.

Owns one thread for as long as an iteration lasts. Only for items whose making draws no random numbers: what else runs
meanwhile may draw from the same generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetched(items: Iterable[T], start_thread: Callable[[], None] | None = None) -> Iterator[T]:
    """Give the items in order, each made in a thread while its predecessor is in use.

    What making an item raises is raised in its place. `start_thread` runs in the thread before anything else.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, "prefetch", start_thread) as thread:
        following = thread.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, iterator, _END)
            yield item  # type: ignore[misc]
