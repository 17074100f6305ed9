"""What the controller makes of positions: a deadlock is believed only of ranks that still wait."""

import pytest

from tests.fixtures.ranks.pool import NUM_EQUAL_PROBES, Result, _is_deadlock
from tests.fixtures.ranks.protocol import Outcome, Position
from tests.fixtures.ranks.trace import Collective


def waiting_in(number):
    collective = Collective("gloo:all_reduce", ((2,),), ("Float",), is_shared=True, is_open=True, number=number)
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
