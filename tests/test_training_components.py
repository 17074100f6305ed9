"""The parts of a step and what surrounds them: gradients, metrics, optimizer, schedule, ranks, output folder."""

import json
import logging
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.fixtures.models import tiny_llama
from tests.fixtures.ranks.launch import Launch
from tests.fixtures.runs import build_arguments, build_trainer, chat_job, random_token_samples
from tests.fixtures.tolerances import CLIPPED_NORM, LAYOUT_FLOAT64
from trainer.config.arguments import TrainingArguments
from trainer.config.groups import MachineArguments, OptimizerArguments, ScheduleArguments
from trainer.data.length import run_length
from trainer.data.loader import MaxTokensPerRankCollator
from trainer.data.order import epoch_order
from trainer.data.packing import TOKENS, cost_model_from_config
from trainer.distributed import failure
from trainer.distributed.group import Group
from trainer.distributed.topology import Topology, current_topology, gpu_index, refuse_lone_slurm_task
from trainer.errors import CheckpointError, RankError, UsageError
from trainer.hf.trainer import Trainer
from trainer.model.precision import emulates_bfloat16
from trainer.optim.build import build_optimizer
from trainer.optim.gradients import clip, global_norm, last_backward
from trainer.optim.schedules import build_schedule
from trainer.training import run_dir
from trainer.training.callbacks import Every
from trainer.training.metrics import BatchMetrics
from trainer.training.run_dir import open_output_dir, sole_run
from trainer.training.signals import SIGNALS, StopRequest
from trainer.training.step import find_non_finite
from trainer.training.task import build_cost


def one_process() -> Group:
    return Group.join(MachineArguments(use_cpu=True))


def policies_of_threads() -> dict[str, int]:
    """How Linux schedules this thread and, by name, the others of this process."""
    tasks = Path("/proc/self/task").iterdir()
    policies = {(task / "comm").read_text().strip(): os.sched_getscheduler(int(task.name)) for task in tasks}
    return {"": os.sched_getscheduler(0), **policies}


def policies_in_a_group() -> dict[str, int]:
    with one_process() as group:
        group.barrier()  # else one may leave before the other has come
        return policies_of_threads()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux schedules so")
class TestScheduling:
    """Threads of gloo give way to those that compute, whoever starts the group."""

    def check(self, policies: dict[str, int]) -> None:
        assert {policies[name] for name in policies if "gloo" in name} == {os.SCHED_BATCH}
        assert policies[""] == os.SCHED_OTHER

    def test_gloo_threads_of_a_trainer_are_scheduled_as_batch_work(self, launch: Launch) -> None:
        for policies in launch(2, policies_in_a_group, group=False).values:
            self.check(policies)

    def test_gloo_threads_of_a_test_are_scheduled_as_batch_work(self, ranks) -> None:
        self.check(policies_of_threads())


class TestGradients:
    def parameters(self) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        made[0].grad, made[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        return made

    def test_the_norm_is_over_all_gradients_together(self) -> None:
        assert global_norm(self.parameters()).item() == 5.0

    @pytest.mark.parametrize(("max_norm", "left"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
    def test_clipping_scales_down_and_never_up(self, max_norm: float, left: float) -> None:
        parameters = self.parameters()
        clip(parameters, global_norm(parameters), max_norm)
        assert global_norm(parameters).item() == pytest.approx(left, rel=CLIPPED_NORM)

    @pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0])
    def test_clipping_is_torchs_at_gradients_of_any_size(self, size: float) -> None:
        ours, theirs = self.parameters(), self.parameters()
        for parameter in (*ours[:2], *theirs[:2]):
            assert parameter.grad is not None
            parameter.grad *= size
        clip(ours, global_norm(ours), size)
        torch.nn.utils.clip_grad_norm_(theirs, size)
        assert [p.grad.tolist() for p in ours[:2]] == [p.grad.tolist() for p in theirs[:2]]

    def test_the_norm_of_no_gradients_is_0_and_nothing_is_clipped(self) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(2))]
        norm = global_norm(parameters)
        clip(parameters, norm, max_norm=1.0)
        assert (norm.item(), parameters[0].grad) == (0.0, None)

    @pytest.mark.world_size(2)
    def test_the_norm_of_sharded_gradients_is_that_of_the_whole(self, ranks) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
        parameter = torch.nn.Parameter(distribute_tensor(torch.zeros_like(whole), ranks.mesh(), [Shard(0)]))
        parameter.grad = distribute_tensor(whole, ranks.mesh(), [Shard(0)])
        norm = global_norm([parameter])
        assert norm.item() == pytest.approx(whole.norm().item(), rel=LAYOUT_FLOAT64)
        clip([parameter], norm, 1.0)
        assert parameter.grad.full_tensor().norm().item() == pytest.approx(1.0, rel=CLIPPED_NORM)

    @pytest.mark.parametrize(("loss", "norm", "named"), [(math.nan, 1.0, "loss"), (1.0, math.inf, "gradient norm")])
    def test_a_non_finite_number_is_named(self, loss: float, norm: float, named: str) -> None:
        assert find_non_finite(1.0, 1.0) is None
        assert (find_non_finite(loss, norm) or "").startswith(f"{named} is ")


class TestBatchMetrics:
    def test_metrics_sum_numbers_and_tensors(self) -> None:
        metrics = BatchMetrics()
        metrics.accumulate(loss=torch.tensor(1.5), tokens=3)
        metrics.accumulate(loss=torch.tensor(2.0), tokens=4)
        assert metrics.reduce(one_process()) == {"loss": 3.5, "tokens": 7.0}

    def test_metrics_are_empty_after_reducing(self) -> None:
        metrics = BatchMetrics()
        metrics.accumulate(loss=1.0)
        metrics.reduce(one_process())
        metrics.accumulate(loss=2.0)
        assert metrics.reduce(one_process()) == {"loss": 2.0}

    def test_many_small_values_are_not_lost(self) -> None:
        metrics = BatchMetrics()
        metrics.accumulate(loss=torch.tensor(2.0**24))
        for _ in range(16):
            metrics.accumulate(loss=torch.tensor(1.0))
        assert metrics.reduce(one_process()) == {"loss": 2.0**24 + 16}

    @pytest.mark.world_size(2, 3)
    def test_metrics_are_summed_over_ranks(self, ranks) -> None:
        metrics = BatchMetrics()
        metrics.accumulate(rank=ranks.rank, one=1)
        total = sum(range(ranks.world_size))
        assert metrics.reduce(one_process()) == {"one": ranks.world_size, "rank": total}

    def test_metrics_keep_no_graph(self) -> None:
        weight = torch.ones((), requires_grad=True)
        metrics = BatchMetrics()
        metrics.accumulate(loss=weight * 2)
        assert metrics.reduce(one_process()) == {"loss": 2.0}

    def test_packing_efficiency_counts_the_budgets_of_all_ranks(self) -> None:
        task = build_trainer(Path("unused"), random_token_samples([4, 3]), max_tokens_per_rank=10).task
        first: Any = {"batch_num_loss_counted_tokens": 5, "batch_num_tokens": 5, "batch_num_samples": 2}
        assert task.counts([first]).packing_efficiency == 0.5
        assert task.counts([first, first]).packing_efficiency == 0.25


class TestOptimizer:
    def test_a_model_without_trainable_parameters_is_refused(self) -> None:
        with pytest.raises(UsageError, match="every parameter is frozen"):
            build_optimizer(tiny_llama().requires_grad_(False), OptimizerArguments())

    def test_settings_reach_the_optimizer(self) -> None:
        args = OptimizerArguments(learning_rate=0.3, adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-3)
        group = build_optimizer(tiny_llama(), args).param_groups[0]
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.7), 1e-3)

    def test_an_unknown_name_gets_the_nearest(self) -> None:
        with pytest.raises(UsageError, match="did you mean 'adamw_torch_fused'"):
            build_optimizer(tiny_llama(), OptimizerArguments(optim="adamw_torch_fussed"))


class TestSchedule:
    def test_a_share_of_endless_training_is_refused(self) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        args = ScheduleArguments(lr_scheduler_type="constant_with_warmup", warmup_steps=0.5)
        with pytest.raises(UsageError, match="^warmup_steps = 0.5 is a share of all steps, but training never ends"):
            build_schedule(optimizer, args, None)


class TestRunLength:
    def test_a_run_of_infinite_epochs_never_ends(self) -> None:
        import numpy as np

        assert run_length(np.ones(20), 1, 0, ScheduleArguments(num_train_epochs=1e308)).num_steps is None

    @given(
        counts=st.lists(st.integers(1, 9), min_size=1, max_size=30),
        batch_size=st.integers(1, 8),
        limit=st.integers(1, 300),
        seed=st.integers(0, 3),
    )
    def test_the_first_step_that_reaches_the_tokens(
        self, counts: list[int], batch_size: int, limit: int, seed: int
    ) -> None:
        import numpy as np

        found = run_length(np.array(counts), batch_size, seed, ScheduleArguments(max_tokens=limit)).num_steps
        trained, step, epoch = 0, 0, 0
        while trained < limit:
            order = epoch_order(len(counts), seed, epoch)
            for start in range(0, len(counts), batch_size):
                if trained < limit:
                    trained += sum(counts[i] for i in order[start : start + batch_size])
                    step += 1
            epoch += 1
        assert found == step


class TestTopology:
    def test_a_topology_without_torchrun_is_one_process(self) -> None:
        assert Topology.from_environment({}) == Topology(0, 1, 0, 1)

    def test_the_topology_is_what_torchrun_sets(self) -> None:
        environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
        topology = Topology.from_environment(environment)
        assert (topology.rank, topology.local_rank, topology.is_main, topology.is_local_main) == (5, 1, False, False)
        assert topology.restart == 0
        assert Topology.from_environment(environment | {"TORCHELASTIC_RESTART_COUNT": "2"}).restart == 2

    @pytest.mark.parametrize("environment", [{"RANK": "two"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "-1"}])
    def test_nonsense_is_refused(self, environment: dict[str, str]) -> None:
        with pytest.raises(UsageError, match="torchrun"):
            Topology.from_environment(environment)

    def test_a_slurm_job_of_several_tasks_without_ranks_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"SLURM runs 4 tasks .*srun --ntasks-per-node=1 torchrun"):
            refuse_lone_slurm_task({"SLURM_NTASKS": "4"})
        refuse_lone_slurm_task({"SLURM_NTASKS": "4", "RANK": "0", "WORLD_SIZE": "8"})
        refuse_lone_slurm_task({"SLURM_NTASKS": "1"})

    def test_a_rank_gets_its_gpu_or_the_only_one_it_is_shown(self) -> None:
        last_of_two = Topology(1, 2, 1, 2)
        assert gpu_index(last_of_two, 2, None) == 1
        assert gpu_index(last_of_two, 1, "5") == 0
        for num_visible, visible in ((1, None), (0, "")):
            with pytest.raises(UsageError, match="local rank 1 of 2 has no GPU"):
                gpu_index(last_of_two, num_visible, visible)

    def test_a_store_that_never_answers_does_not_hold_up_the_message(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(failure, "SECONDS_TO_SPEAK", 0.05)
        released = threading.Event()

        def ask_a_frozen_host() -> str:
            released.wait()
            return "an answer"

        assert failure._within_deadline(ask_a_frozen_host, "no answer") == "no answer"
        released.set()
        assert failure._within_deadline(ask_a_frozen_host, "no answer") == "an answer"

    @pytest.mark.world_size(2)
    @pytest.mark.parametrize(
        ("environment", "local"),
        [
            ({}, None),  # as torch.multiprocessing.spawn leaves it: every rank is on this node
            ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (0, 1)),
            ({"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, (0, 1)),
        ],
        ids=["spawned", "torchrun", "srun"],
    )
    def test_a_group_says_the_rank_whoever_made_it(self, ranks, environment, local) -> None:
        if "SLURM_NTASKS" in environment:
            environment = {**environment, "SLURM_PROCID": str(ranks.rank), "SLURM_NODEID": str(ranks.rank)}
        found = current_topology(environment)
        assert (found.rank, found.world_size) == (ranks.rank, 2)
        assert (found.local_rank, found.local_world_size) == (local or (ranks.rank, 2))

    @pytest.mark.world_size(2)
    def test_data_and_steps_in_backward_ask_the_group_not_the_environment(self, ranks, monkeypatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        collator = MaxTokensPerRankCollator(64)
        assert (collator.global_rank, collator.world_size) == (ranks.rank, 2)
        whole = torch.nn.Linear(1, 1)  # not sharded: its gradient must be summed over ranks before the step
        args = OptimizerArguments(optim="lomo", learning_rate=0.1, max_grad_norm=0.0)
        optimizer = build_optimizer(whole, args)
        before = whole.weight.item()
        with last_backward(optimizer):
            whole(torch.ones(1, 1)).sum().backward()
        assert whole.weight.item() == before
        assert whole.weight.grad is not None

    @pytest.mark.world_size(2)
    def test_the_group_of_a_test_is_joined_and_left_alone(self, ranks) -> None:
        with one_process() as group:
            assert (group.rank, group.world_size) == (ranks.rank, 2)
            assert group.any(ranks.rank == 1)
            assert not group.any(False)
        assert torch.distributed.is_initialized()

    @pytest.mark.world_size(3)
    def test_the_first_rank_of_a_node_goes_first(self, ranks) -> None:
        group = one_process()
        group.topology = Topology(ranks.rank, 3, ranks.rank, 3)
        file = ranks.tmp_path / "made"
        with group.main_first():
            if ranks.is_main:
                file.touch()
            assert file.exists()

    @pytest.mark.world_size(3)
    def test_all_ranks_stop_when_the_first_of_a_node_fails(self, ranks) -> None:
        group = one_process()
        group.topology = Topology(ranks.rank, 3, ranks.rank, 3)
        kind, message = (KeyError, "why") if ranks.is_main else (RankError, "see its message")

        def fail() -> None:
            with group.main_first():
                raise KeyError("why")

        with pytest.raises(kind, match=message):
            fail()


class TestCheckpointing:
    def test_saved_weights_load_in_transformers(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path / "run", random_token_samples((5, 6)))
        loaded = AutoModelForCausalLM.from_pretrained(trainer.save_model(tmp_path / "saved"))
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)

    def test_weights_beyond_a_narrower_type_are_refused(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path / "run", random_token_samples((5, 6)), save_dtype="float16")
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(1e6)
        with pytest.raises(CheckpointError, match="beyond the range of float16"):
            trainer.save_model(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_the_saved_type_can_be_chosen(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path / "run", random_token_samples((5, 6)), save_dtype="bfloat16")
        assert AutoModelForCausalLM.from_pretrained(trainer.save_model(tmp_path / "saved")).dtype == torch.bfloat16


class TestOutputFolder:
    def test_a_folder_that_cannot_be_made_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="cannot be written"):
            open_output_dir(build_arguments(tmp_path / "file" / "run"), one_process())

    @pytest.mark.world_size(2)
    def test_all_ranks_raise_when_the_folder_cannot_be_made(self, ranks) -> None:
        (ranks.tmp_path / "file").write_text("")
        ranks.barrier()
        with pytest.raises(UsageError):
            open_output_dir(build_arguments(ranks.tmp_path / "file" / "run"), one_process())

    def test_what_else_lies_there_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "metrics.jsonl").write_text(json.dumps({}))
        open_output_dir(build_arguments(tmp_path, overwrite_output_dir=True), one_process())
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_two_runs_never_mix_in_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_dir, "SECONDS_FOR_OTHERS", 0.1)
        args, group = build_arguments(tmp_path / "run"), one_process()
        with sole_run(args, group):
            with pytest.raises(UsageError, match="is in use by a run that is going on"), sole_run(args, group):
                pass
            with sole_run(build_arguments(tmp_path / "other"), group):
                pass
        with sole_run(args, group):
            assert list((tmp_path / "run").iterdir()) == []


class TestStopRequest:
    def test_the_first_signal_is_remembered_and_the_second_is_the_system_s(self) -> None:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        try:
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGINT)
                assert stop.signal == signal.SIGINT
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_signal_that_is_ignored_stays_so(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        try:
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.signal is None
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_any_rank_s_signal_counts(self) -> None:
        stop = StopRequest()
        flags = stop.as_flags()
        assert stop.agreed(flags) == (None, False)
        assert stop.agreed({**flags, "stopped_by_SIGTERM": 1.0}) == (signal.SIGTERM, False)
        assert stop.agreed({**flags, "asked_to_save": 1.0}) == (None, True)
        assert len(flags) == len(SIGNALS) + 1


class TestEvery:
    @given(interval=st.integers(1, 20), growth=st.lists(st.integers(0, 30), max_size=20), start=st.integers(0, 50))
    def test_an_interval_is_due_once_for_steps_past_multiples(
        self, interval: int, growth: list[int], start: int
    ) -> None:
        every, count = Every(interval, start), start
        for more in growth:
            passed = (count + more) // interval > count // interval
            count += more
            assert every.is_due(count) == passed

    def test_no_interval_is_never_due(self) -> None:
        assert not Every(None).is_due(10**9)


def test_packing_balances_what_the_options_say() -> None:
    model = tiny_llama()
    assert build_cost(TrainingArguments(packing_cost="tokens"), model) == TOKENS
    of_model = build_cost(TrainingArguments(packing_cost="attention"), model)
    assert of_model == cost_model_from_config(model.config) != TOKENS


def test_a_name_that_is_not_there_is_refused_as_the_trainer_is_built(tmp_path: Path) -> None:
    """Also one that was assigned since the options were built."""
    for name, value, message in (("score_answers", ["nowhere:scorer"], "nowhere"), ("optim", "adamw_nowhere", "optim")):
        trainer = build_trainer(tmp_path, random_token_samples((5, 6)))
        setattr(trainer.args, name, value)
        with pytest.raises(UsageError, match=message):
            Trainer(tiny_llama(), trainer.args, train_dataset=trainer.train_dataset)


def test_the_log_says_from_where_a_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "async_save": False, "batch_size": 1}
    with caplog.at_level(logging.INFO):
        build_trainer(tmp_path, random_token_samples((5, 6)), **options, max_steps=1).train()
        assert "resumes from" not in caplog.text
        build_trainer(tmp_path, random_token_samples((5, 6)), **options, max_steps=1).train(resume_from_checkpoint=True)
    assert f"resumes from {tmp_path / 'checkpoints' / 'step_1'}, after step 1" in caplog.text


def test_the_log_says_what_is_unusual_of_the_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = chat_job(tmp_path)
    chats = Path(job["data_path"])
    chats.write_text(chats.read_text() + chats.read_text().splitlines()[0] + "\n")
    Trainer(args=TrainingArguments(str(tmp_path / "run"), **job))
    assert (
        "exact duplicates: 1" in [record.getMessage() for record in caplog.records if record.levelname == "WARNING"][0]
    )


class TestPrecision:
    @pytest.mark.learns
    @pytest.mark.world_size(1, 2)
    def test_bf16_keeps_float32_weights_and_learns(self, ranks, tmp_path: Path) -> None:
        trainer = build_trainer(ranks.tmp_path, random_token_samples((9,) * 8), bf16=True, num_train_epochs=10)
        output = trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert output.training_loss < math.log(64)

    def test_a_half_precision_model_gets_float32_master_weights(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path, random_token_samples((5, 6)), tiny_llama(dtype=torch.bfloat16))
        assert trainer.model.dtype == torch.float32
        assert AutoModelForCausalLM.from_pretrained(trainer.save_model(tmp_path / "s")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "emulates"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),  # nothing is claimed
        ({}, False),
    ],
    ids=str,
)
def test_bfloat16_is_emulated_where_the_processor_has_no_instructions_for_it(capabilities, emulates):
    assert emulates_bfloat16(capabilities) is emulates
