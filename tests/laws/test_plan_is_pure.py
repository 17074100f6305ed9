"""L6 for plans: lengths, budget, ranks and cost decide them, and nothing else; ranks agree without talking."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.strategies import PackingCase, cost_models, packing_cases
from trainer.data.packing import CostModel, batch_lengths_to_minibatches_lpt, plan_batch

PLAN_IN_A_NEW_PROCESS = """
import sys
from trainer.data.length import forecast
from trainer.data.packing import CostModel, plan_batch
from trainer.data.order import epoch_order
lengths = (epoch_order(500, 1, 2) * 7 % 1900 + 1).tolist()
print(plan_batch(lengths, 2048, 4, CostModel(5376, 1)))
assert "torch" not in sys.modules, "planning must not load torch"
"""


def in_a_new_process(hash_seed: int) -> str:
    command = [sys.executable, "-c", PLAN_IN_A_NEW_PROCESS]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_processes_agree_and_need_no_torch() -> None:
    assert in_a_new_process(hash_seed=1) == in_a_new_process(hash_seed=2)


def test_plan_is_what_it_was_when_first_published() -> None:
    plan = plan_batch([50, 20, 90, 10, 40, 60, 30, 80, 70, 100], 128, 2, CostModel(100, 1))
    assert plan.packs == (((9,), (2, 3)), ((1, 8), (7,)), ((0, 4), (5, 6)))


@given(case=packing_cases(), cost=cost_models())
def test_planning_twice_gives_the_same(case: PackingCase, cost: CostModel) -> None:
    assert plan_batch(*case, cost) == plan_batch(np.array(case.lengths, np.int64), *case[1:], cost)


@given(case=packing_cases(), cost=cost_models(), factor=st.integers(2, 9))
def test_unit_of_cost_does_not_matter(case: PackingCase, cost: CostModel, factor: int) -> None:
    scaled = CostModel(cost.per_token * factor, cost.per_square * factor)
    one, other = plan_batch(*case, cost), plan_batch(*case, scaled)
    assert one.num_micro_batches == other.num_micro_batches


@given(case=packing_cases(min_size=1), data=st.data())
def test_order_of_samples_does_not_change_the_loads(case: PackingCase, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(case.lengths))
    assert loads(case) == loads(case._replace(lengths=list(shuffled)))


def loads(case: PackingCase) -> list[list[int]]:
    plan = plan_batch(*case)
    return [[sum(case.lengths[i] for i in pack) for pack in packs] for packs in plan.packs]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_can_plan_alone(rank: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    own = batch_lengths_to_minibatches_lpt(lengths, 128, 4, rank)
    assert own == [list(pack) for pack in plan_batch(lengths, 128, 4).of_rank(rank)]
