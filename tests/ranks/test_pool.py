"""What the controller makes of positions: a deadlock is believed only of ranks that still wait. And what forks cost."""

import os
import re
from pathlib import Path

import pytest

from tests.fixtures.ranks.collectives import Collective
from tests.fixtures.ranks.pool import NUM_EQUAL_PROBES, Result, _is_deadlock
from tests.fixtures.ranks.protocol import Outcome, Position
from tests.fixtures.ranks.zygote import collapse_huge_pages


def waiting_in(number):
    collective = Collective("gloo:all_reduce", ((2,),), ("Float",), is_open=True, number=number)
    return Position(is_blocked=True, call="all_reduce", where="here", collectives=[collective], stack="a stack")


BUSY = Position(is_blocked=False, call="work", where="here", collectives=[], stack="a stack")


@pytest.mark.parametrize(
    ("places", "is_deadlock"),
    [
        ([None, None], False),  # both ended while they were asked
        ([waiting_in(1), None], True),
        ([waiting_in(1), waiting_in(1)], False),  # slow, but together
        ([waiting_in(1), waiting_in(2)], True),
        ([waiting_in(1), BUSY], False),
    ],
    ids=["both ended", "one waits", "together", "apart", "one works"],
)
def test_who_waits_for_whom(places, is_deadlock):
    results = [Result(rank, None if place else Outcome(1)) for rank, place in enumerate(places)]
    assert _is_deadlock([places] * NUM_EQUAL_PROBES, results) is is_deadlock


def huge_megabytes() -> int:
    """How much memory of this process lies in huge pages."""
    found = re.search(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found.group(1)) >> 10 if found else 0


def gather() -> tuple[int, bool]:
    """Megabytes that came to lie in huge pages, and whether what they hold is what it was."""
    content = os.urandom(1 << 20) * 16
    held, before = bytearray(content), huge_megabytes()
    collapse_huge_pages()
    return huge_megabytes() - before, held == content


def linux_version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


@pytest.mark.skipif(linux_version() < (6, 1), reason="Linux gathers pages on demand since 6.1")
def test_memory_is_gathered_into_huge_pages(launch):
    [(megabytes, is_unchanged)] = launch(1, gather, group=False).values
    assert is_unchanged
    assert megabytes >= 16
