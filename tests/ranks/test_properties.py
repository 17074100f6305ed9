"""Hypothesis across ranks: one draw for all, shrinking, deadlocks too."""

import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.ranks.inner import run_once

FAILING = """
from hypothesis import given, settings, strategies as st
number, small = st.integers(0, 1000), st.integers(0, 15)  # each failing example costs new ranks
settings.register_profile("inner", max_examples=30, derandomize=True, database=None)
settings.load_profile("inner")

@given(xs=st.lists(st.integers(0, 120), max_size=3))
def test_on_one_rank(ranks, xs):
    if ranks.rank == 1:
        assert all(x <= 100 for x in xs)
    reduce()

@given(n=small)
def test_deadlock(ranks, n):
    reduce()
    if n >= 7 and ranks.rank == 1:
        reduce()

@given(n=small)
def test_killed(ranks, n):
    if n > 9 and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

@given(n=small)
def test_other_collectives(ranks, n):
    x = torch.ones(4, dtype=[torch.float32, torch.int32][ranks.rank if n > 5 else 0])
    dist.all_reduce(x)

@given(data=st.data())
def test_draws_inside(ranks, data): pass

@given(n=number)
def test_after(ranks, n): reduce()
"""


@pytest.fixture
def failures(launch, tmp_path_factory):
    """One inner run for all tests below."""
    return run_once("properties", tmp_path_factory, launch, FAILING)


@given(xs=st.lists(st.integers(0, 1000)))
def test_every_rank_gets_the_same_values(ranks, xs):
    mine = torch.tensor([len(xs), sum(xs)])
    total = mine.clone()
    dist.all_reduce(total)
    assert torch.equal(total, mine * ranks.world_size)


@given(n=st.integers(0, 1000))
def test_assumptions_hold_on_every_rank(ranks, n):
    assume(n % 2)
    dist.all_reduce(torch.ones(1))
    assert n % 2


class TestMethods:
    @pytest.mark.world_size(1, 2)
    @pytest.mark.parametrize("k", [1, 2])
    @given(n=st.integers(0, 10))
    def test_parameters_and_draws_mix(self, ranks, k, n):
        assert isinstance(self, TestMethods)
        assert k + n <= 12


@pytest.mark.parametrize(
    ("name", "example", "said"),
    [
        ("on_one_rank", r"xs=\[101\]", r"──────── rank 1 of 2 \(gloo\)"),
        ("on_one_rank", r"xs=\[101\]", r"rank 0 .* released waits in all_reduce #1"),
        ("deadlock", "n=7", r"E   deadlock: rank 0 finished after collective #1, rank 1 waits in all_reduce #2"),
        ("killed", "n=10", r"E   rank 1/2 killed by SIGKILL"),
        ("other_collectives", "n=6", r"E   collective #1 of the test differs: .*Float; .*Int"),
        ("draws_inside", "data", r"ranks cannot draw inside the test; draw every value in @given"),
    ],
)
def test_a_failing_example_shrinks(failures, name, example, said):
    block = failures.block(f"test_{name}[gloo-2]")
    assert re.search(said, block)
    assert re.search(example, block)


def test_the_next_property_passes(failures):
    assert failures.outcome("test_after[gloo-2]") == "passed"
