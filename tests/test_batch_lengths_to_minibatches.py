"""Packing: the fixed contract of both functions, the quality of the planner, and its bounds against the true optimum.

Run as a script, it prints how the planner compares with the textbook ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures import tolerances
from tests.fixtures.packing_cases import DISTRIBUTIONS, instances, optimum
from tests.fixtures.peers_packing import PEERS
from tests.fixtures.strategies import PackingCase, cost_models, packing_cases
from trainer.data import planner
from trainer.data.packing import (
    TOKENS,
    CostModel,
    Plan,
    batch_lengths_to_minibatches,
    batch_lengths_to_minibatches_lpt,
    cost_model_from_config,
    plan_batch,
)
from trainer.data.planner import least_packs, least_step_cost, most_cost_within
from trainer.errors import DataError, UsageError

Packer = Callable[..., list[list[int]]]
Shares = list[list[list[int]]]  # shares[rank][micro_batch]: indices

PACKERS = (batch_lengths_to_minibatches, batch_lengths_to_minibatches_lpt)
SEVEN_BILLION = CostModel(per_token=24576, per_square=1)
HALF_BILLION = CostModel(per_token=5376, per_square=1)
COSTS = {"tokens": TOKENS, "7B": SEVEN_BILLION, "0.5B": HALF_BILLION}

both_packers = pytest.mark.parametrize("packer", PACKERS)


def all_shares(packer: Packer, lengths: list[int], budget: int, num_ranks: int) -> Shares:
    return [packer(lengths, budget, num_ranks, rank) for rank in range(num_ranks)]


def plan_shares(plan: Plan) -> Shares:
    return [[list(pack) or [-1] for pack in plan.of_rank(rank)] for rank in range(plan.num_ranks)]


def check_contract(shares: Shares, lengths: list[int], budget: int) -> None:
    packs = [pack for share in shares for pack in share]
    assert len({len(share) for share in shares}) == 1, "every rank runs the same number of micro-batches"
    assert all(pack == [-1] or (pack and min(pack) >= 0) for pack in packs), "a placeholder is [-1], alone"
    assert sorted(i for pack in packs for i in pack if i >= 0) == list(range(len(lengths))), "each sample once"
    assert all(sum(lengths[i] for i in pack if i >= 0) <= budget for pack in packs), "none over the budget"
    assert packs.count([-1]) == max(0, len(packs) - len(lengths)), "placeholders only where samples are too few"


def step_cost(lengths: list[int], packs: list[list[int]], num_ranks: int, cost: CostModel) -> int:
    """Sum over groups of num_ranks packs, in the order given, of the dearest pack."""
    costs = [sum(cost.of(lengths[i]) for i in pack) for pack in packs]
    return sum(max(costs[start : start + num_ranks]) for start in range(0, len(costs), num_ranks))


def flat(plan: Plan) -> list[list[int]]:
    return [list(pack) for micro_batch in plan.packs for pack in micro_batch]


def bounds(lengths: list[int], budget: int, num_ranks: int, num_micro_batches: int, cost: CostModel) -> tuple[int, int]:
    ordered = np.array(sorted(lengths, reverse=True), np.int64)
    step = least_step_cost(ordered, budget, num_ranks, num_micro_batches, cost)
    return max(1, -(-least_packs(ordered, budget) // num_ranks)), step


@both_packers
class TestBatchLengthsToMinibatches:
    def test_empty_batch(self, packer: Packer) -> None:
        assert all_shares(packer, [], 100, 4) == [[], [], [], []]

    def test_single_sequence(self, packer: Packer) -> None:
        assert all_shares(packer, [5000], 130_000, 4) == [[[0]], [[-1]], [[-1]], [[-1]]]

    def test_sample_of_exactly_the_budget(self, packer: Packer) -> None:
        assert all_shares(packer, [100, 100], 100, 1) == [[[0], [1]]]

    def test_one_token_too_many_opens_a_micro_batch(self, packer: Packer) -> None:
        assert len(packer([50, 50], 100, 1, 0)) == 1
        assert len(packer([50, 51], 100, 1, 0)) == 2

    def test_zero_length_samples_are_kept(self, packer: Packer) -> None:
        lengths = [0, 10, 0, 0]
        check_contract(all_shares(packer, lengths, 10, 2), lengths, 10)

    @pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16])
    def test_arrays_and_lists_give_the_same(self, packer: Packer, kind: type) -> None:
        lengths = [30, 10, 20, 40, 5]
        assert all_shares(packer, np.array(lengths, kind), 50, 2) == all_shares(packer, lengths, 50, 2)

    def test_indices_are_plain_integers(self, packer: Packer) -> None:
        share = packer(np.array([3, 4, 5]), 6, 1, 0)
        assert {type(i) for pack in share for i in pack} == {int}

    def test_overlong_sample_is_named(self, packer: Packer) -> None:
        with pytest.raises(DataError, match=r"sample 1 has 200 tokens.*max_tokens_per_rank=100"):
            packer([10, 200, 300], 100, 2, 0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([1], 10, 2, 2), r"rank 2 is not in 0\.\.1"),
            (([1], 10, 2, -1), r"rank -1 is not in 0\.\.1"),
            (([1], 0, 2, 0), r"max_tokens_per_rank=0"),
            (([1], 10, 0, 0), r"num_ranks=0|rank 0"),
            (([3, -1], 10, 2, 0), r"sample 1 has length -1"),
            (([1.5], 10, 2, 0), r"float64: a flat list of integers"),
            (([[1, 2]], 10, 2, 0), r"shape \(1, 2\)"),
        ],
    )
    def test_bad_arguments_are_refused(self, packer: Packer, arguments: tuple[object, ...], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            packer(*arguments)

    @given(case=packing_cases())
    def test_contract(self, packer: Packer, case: PackingCase) -> None:
        check_contract(all_shares(packer, *case), case.lengths, case.budget)


class TestGreedy:
    def test_greedy_packing_takes_samples_in_order(self) -> None:
        shares = all_shares(batch_lengths_to_minibatches, [60, 50, 30, 70, 10], 100, 2)
        assert shares == [[[0], [3]], [[1, 2], [4]]]


class TestPlanner:
    @given(case=packing_cases(), cost=cost_models())
    def test_contract_under_any_cost(self, case: PackingCase, cost: CostModel) -> None:
        check_contract(plan_shares(plan_batch(*case, cost)), case.lengths, case.budget)

    @given(case=packing_cases(max_size=6, max_ranks=3, min_size=1), cost=cost_models())
    def test_bounds_are_never_above_the_optimum(self, case: PackingCase, cost: CostModel) -> None:
        num_micro_batches, step = optimum(*case, cost.of)
        least, least_step = bounds(*case, num_micro_batches, cost)
        assert least <= num_micro_batches
        assert least_step <= step

    def test_a_pack_too_full_for_one_sample_takes_a_shorter_one_later(self) -> None:
        batch = planner.Batch(np.array([8, 7, 2, 2, 1]), capacity=10, num_ranks=2, cost=CostModel(0, 1))
        assert planner._fill(batch, [], 2) == [[0, 3], [1, 2, 4]]

    def test_most_cost_takes_the_longest_samples_and_the_last_in_part(self) -> None:
        most = most_cost_within(np.array([4, 2]), CostModel(0, 1), np.array([0, 3, 4, 5, 6, 9]))
        assert most.tolist() == [0, 12, 16, 18, 20, 20]

    @given(case=packing_cases(max_size=6, max_ranks=3, min_size=1))
    def test_small_batches_take_the_fewest_micro_batches(self, case: PackingCase) -> None:
        assert plan_batch(*case).num_micro_batches == optimum(*case, TOKENS.of)[0]

    @given(case=packing_cases(min_size=1), cost=cost_models())
    def test_dearest_micro_batch_comes_first(self, case: PackingCase, cost: CostModel) -> None:
        plan = plan_batch(*case, cost)
        dearest = [max(sum(cost.of(case.lengths[i]) for i in pack) for pack in packs) for packs in plan.packs]
        assert dearest == sorted(dearest, reverse=True)

    def test_case_that_plain_lpt_packs_badly(self) -> None:
        assert plan_batch([60] * 80 + [40] * 80, 100, 8).num_micro_batches == 10

    def test_lpt_is_the_planner_with_token_costs(self) -> None:
        lengths = DISTRIBUTIONS["chat"](np.random.default_rng(0), 64, 8192)
        shares = plan_shares(plan_batch(lengths, 8192, 4, TOKENS))
        assert all_shares(batch_lengths_to_minibatches_lpt, lengths, 8192, 4) == shares

    def test_work_of_ranks_is_level_over_the_step(self) -> None:
        lengths = DISTRIBUTIONS["chat"](np.random.default_rng(1), 1024, 8192)
        plan = plan_batch(lengths, 8192, 8, SEVEN_BILLION)
        work = [sum(SEVEN_BILLION.of(lengths[i]) for pack in plan.of_rank(r) for i in pack) for r in range(8)]
        assert max(work) / min(work) - 1 < tolerances.PACKING_RANK_WORK


class TestCostModel:
    @given(cost=cost_models(), length=st.integers(0, 200_000))
    def test_longest_within_inverts_the_cost(self, cost: CostModel, length: int) -> None:
        if cost.of(length) == cost.of(length + 1):
            return
        assert cost.longest_within(cost.of(length)) == length
        assert cost.longest_within(cost.of(length + 1) - 1) == length

    @pytest.mark.parametrize(("hidden", "per_token"), [(4096, 24576), (896, 5376)])
    def test_bare_shape_gives_six_times_the_width(self, hidden: int, per_token: int) -> None:
        assert cost_model_from_config({"hidden_size": hidden, "num_hidden_layers": 24}) == CostModel(per_token, 1)

    def test_seven_billion_model_by_hand(self) -> None:
        config = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32}
        weights = 4 * 4096**2 + 3 * 4096 * 11008
        assert cost_model_from_config(config) == CostModel(round(2 * weights / (4 * 4096)), 1)

    def test_head_counts_as_linear_work(self) -> None:
        config = {"hidden_size": 64, "num_hidden_layers": 2}
        with_head = cost_model_from_config({**config, "vocab_size": 1000})
        assert with_head.per_token - cost_model_from_config(config).per_token == 2 * 64 * 1000 // (4 * 64 * 2)

    def test_sliding_layers_have_no_square(self) -> None:
        config = {"hidden_size": 64, "num_hidden_layers": 2, "sliding_window": 100}
        kinds = ["sliding_attention", "full_attention"]
        assert cost_model_from_config({**config, "layer_types": kinds}) == CostModel(2 * 6 * 64 + 100, 1)

    def test_mixture_counts_active_experts(self) -> None:
        dense = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
        mixture = {**dense, "intermediate_size": 999, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
        assert cost_model_from_config(mixture) == cost_model_from_config(dense)

    def test_no_full_attention_means_tokens(self) -> None:
        config = {"hidden_size": 64, "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
        assert cost_model_from_config(config) == TOKENS

    def test_transformers_configs_and_their_dicts_agree(self) -> None:
        transformers = pytest.importorskip("transformers")
        for config in (transformers.LlamaConfig(num_key_value_heads=8), transformers.GPT2Config()):
            assert cost_model_from_config(config) == cost_model_from_config(config.to_dict())

    def test_shapeless_config_is_refused(self) -> None:
        with pytest.raises(UsageError, match="hidden_size"):
            cost_model_from_config({})

    @pytest.mark.parametrize(("per_token", "per_square"), [(0, 0), (-1, 1), (1, -1)])
    def test_impossible_costs_are_refused(self, per_token: int, per_square: int) -> None:
        with pytest.raises(UsageError, match="per_token"):
            CostModel(per_token, per_square)


class TestBatchingEfficiency:
    BUDGETS = (2048, 8192, 32768, 65536)

    @pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
    def test_micro_batches_and_step_are_at_their_bounds(self, cost: CostModel) -> None:
        share_at_bound, above_bound = distance_to_bounds(instances((64, 256, 1024), (2, 8, 64), self.BUDGETS), cost)
        assert share_at_bound >= tolerances.PACKING_SHARE_AT_BOUND
        assert above_bound <= tolerances.PACKING_STEP_ABOVE_BOUND

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
    def test_plans_are_at_their_bounds_from_64_samples_to_8192_and_on_up_to_512_ranks(self, cost: CostModel) -> None:
        sizes, several = (64, 256, 1024, 8192), (2, 8, 64, 512)
        share_at_bound, _ = distance_to_bounds(instances(sizes, (1, *several), self.BUDGETS), cost)
        _, above_bound = distance_to_bounds(instances(sizes, several, self.BUDGETS), cost)  # one rank waits for none
        print(f"\n{cost}: {share_at_bound:.2%} at the bound, steps {above_bound:.2%} above theirs on average")
        assert share_at_bound >= tolerances.PACKING_SHARE_AT_BOUND
        assert above_bound <= tolerances.PACKING_STEP_ABOVE_BOUND

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    def test_the_planner_never_takes_more_micro_batches_than_any_textbook_planner(self, name: str) -> None:
        lengths = DISTRIBUTIONS[name](np.random.default_rng(0), 256, 8192)
        ours = plan_batch(lengths, 8192, 4).num_micro_batches
        assert all(ours <= len(peer(lengths, 8192, 4)) // 4 for peer in PEERS.values())


class TestAlgorithmComparison:
    def test_table_names_every_planner(self) -> None:
        table = comparison(num_samples=64, num_ranks=4, budget=8192)
        assert all(name in table for name in ("planner", *PEERS, *DISTRIBUTIONS))


def distance_to_bounds(cases: Iterable[tuple[str, list[int], int, int]], cost: CostModel) -> tuple[float, float]:
    """(share of plans with the fewest micro-batches there can be, mean excess of a step over the cheapest there is)."""
    at_bound, excess = [], []
    for _, lengths, budget, num_ranks in cases:
        plan = plan_batch(lengths, budget, num_ranks, cost)
        least, least_step = bounds(lengths, budget, num_ranks, plan.num_micro_batches, cost)
        at_bound.append(plan.num_micro_batches == least)
        excess.append(step_cost(lengths, flat(plan), num_ranks, cost) / least_step - 1)
    return float(np.mean(at_bound)), float(np.mean(excess))


def comparison(num_samples: int, num_ranks: int, budget: int) -> str:
    """A table: micro-batches beside their bound, balance under the cost of a 7B model, and time, of each planner."""
    planners = {"planner": lambda *case: flat(plan_batch(*case, SEVEN_BILLION)), **PEERS}
    lines = [f"{num_samples} samples, {num_ranks} ranks, budget {budget}; balance = mean / dearest rank, 7B cost"]
    for name, make in DISTRIBUTIONS.items():
        lengths = make(np.random.default_rng(0), num_samples, budget)
        lines.append(f"\n{name:<22}{'micro-batches':>15}{'bound':>7}{'balance':>9}{'ms':>9}")
        for planner_name, plan in planners.items():
            start = time.perf_counter()
            packs = plan(lengths, budget, num_ranks)
            milliseconds = 1e3 * (time.perf_counter() - start)
            number = len(packs) // num_ranks
            least, _ = bounds(lengths, budget, num_ranks, number, SEVEN_BILLION)
            mean = sum(SEVEN_BILLION.of(length) for length in lengths) / num_ranks
            balance = mean / step_cost(lengths, packs, num_ranks, SEVEN_BILLION)
            lines.append(f"  {planner_name:<20}{number:>15}{least:>7}{balance:>9.4f}{milliseconds:>9.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(comparison(num_samples=1024, num_ranks=8, budget=32768))
    print("\n" + comparison(num_samples=256, num_ranks=4, budget=8192))
