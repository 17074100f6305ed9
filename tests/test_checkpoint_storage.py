"""Sharded tensors on disk: saved on some ranks, read on others bit for bit; every failure is an error on all ranks."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.fixtures.models import build_model, build_pack, prepared_for_packs, tiny_llama
from tests.fixtures.ranks.faults import delay, disk_full
from tests.fixtures.runs import build_trainer, random_token_samples, weights_of, whole_tensors
from trainer.atomic import read_json
from trainer.checkpoint import manifest
from trainer.checkpoint.optimizer_state import pack_optimizer, restore_optimizer
from trainer.checkpoint.tensors import StoredTensors, model_tensors, restore_model
from trainer.checkpoint.verify import check, find_damage, newest_whole
from trainer.checkpoint.writer import CheckpointWriter, Contents
from trainer.cli.main import main
from trainer.config.arguments import TrainingArguments
from trainer.distributed.group import Group
from trainer.errors import CheckpointError
from trainer.model.build import prepare_model
from trainer.model.fsdp import model_mesh
from trainer.model.loss import token_loss_sum

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


RECORDS: dict[str, Any] = {  # what a run adds
    "training_params.json": {},
    "state.json": {"should_stop": False, "should_stop_epoch": False, "callbacks": []}
    | {name: {} for name in ("state", "schedule", "fingerprints")},
}


def build(name: str, seed: int, group: Group) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model("llama_tied", seed=seed)
    model.model.embed_tokens.weight.requires_grad_(seed != 99)
    prepare_model(model, TrainingArguments(use_cpu=True), group.mesh, is_packed=True)
    return model, OPTIMIZERS[name](model.parameters())


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    prepared = prepared_for_packs(model, model_mesh(model))
    for seed in range(count):
        token_loss_sum(prepared, build_pack((5, 9), seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


def contents_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Contents:
    form, tensors = pack_optimizer(optimizer, model)
    return Contents(step, {"model": model_tensors(model), "optimizer": tensors}, {**RECORDS, "optimizer.json": form})


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return whole_tensors({**model_tensors(model), **pack_optimizer(optimizer, model)[1]})


def save(folder: Path, name: str = "adamw", step: int = 2) -> dict[str, torch.Tensor]:
    """Train two steps and save."""
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        model, optimizer = build(name, 0, group)
        take_steps(model, optimizer)
        CheckpointWriter(folder, group, is_async=False, limit=None).save(contents_of(model, optimizer, step))
        return state_of(model, optimizer)


def load_and_save(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """Fill another model and a new optimizer, save both again, and train on."""
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        model, optimizer = build("adamw", 1, group)
        load(source, model, optimizer, group)
        CheckpointWriter(target, group, is_async=False, limit=None).save(contents_of(model, optimizer, 2))
        state = state_of(model, optimizer)
        take_steps(model, optimizer, 1)
        return state


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    found = newest_whole(folder, group).folder
    assert found is not None
    stored = StoredTensors(found, group.rank, group.world_size)
    restore_model(model, stored)
    restore_optimizer(optimizer, model, read_json(found / "optimizer.json"), stored, frozenset())


def test_what_some_ranks_saved_others_read_bit_for_bit(launch, tmp_path: Path) -> None:
    saved = launch(1, save, tmp_path / "0").values[0]
    for number, world_size in enumerate((3, 2, 4, 1)):
        read = launch(world_size, load_and_save, tmp_path / str(number), tmp_path / str(number + 1)).values[0]
        assert_same(read, saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.world_size(1, 2)
def test_any_optimizer_comes_back_bit_for_bit(ranks, name: str) -> None:
    saved = save(ranks.tmp_path, name)
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        model, optimizer = build(name, 1, group)
        load(ranks.tmp_path, model, optimizer, group)
        assert_same(state_of(model, optimizer), saved)


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in other)
    assert all(state[name].dtype == other[name].dtype for name in other)


@pytest.mark.world_size(2, 3)
def test_a_rank_reads_no_more_than_its_shards(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    save(ranks.tmp_path)
    ranks.barrier()
    num_read = []
    original = StoredTensors._slice

    def counting(*args: Any) -> torch.Tensor:
        tensor = original(*args)
        num_read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(StoredTensors, "_slice", counting)
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        model, _ = build("adamw", 1, group)
        restore_model(model, StoredTensors(ranks.tmp_path / "step_2", group.rank, group.world_size))
        assert sum(num_read) == sum(tensor.to_local().numel() for tensor in model_tensors(model).values())


def test_state_that_differs_between_ranks_needs_as_many_ranks(launch, tmp_path: Path) -> None:
    assert launch(2, save_own, tmp_path).values == [0.0, 1.0]
    assert launch(2, load_own, tmp_path).values == [0.0, 1.0]
    for world_size in (1, 3):
        for outcome in launch(world_size, load_own, tmp_path):
            assert isinstance(outcome.error, CheckpointError)
            assert "each of 2 ranks saved a noise of its own" in str(outcome.error)


def save_own(folder: Path) -> float:
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        tensors = {"noise": torch.tensor(float(group.rank)), "alike": torch.ones(2)}
        CheckpointWriter(folder, group, is_async=False, limit=None).save(Contents(1, {"model": tensors}, {}))
        return float(group.rank)


def load_own(folder: Path) -> float:
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        stored = StoredTensors(folder / "step_1", group.rank, group.world_size)
        assert stored.read("alike", ()).tolist() == [1, 1]
        return stored.read("noise", ()).item()


@pytest.fixture
def alone() -> Group:
    return Group.join(TrainingArguments(use_cpu=True))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two checkpoints of one rank, of steps 1 and 2."""
    save(tmp_path, step=1)
    save(tmp_path, step=2)
    return tmp_path


NAMES = (
    "manifest.json",
    "tensors.json",
    "optimizer.json",
    "rank_0.json",
    "model_0.safetensors",
    "optimizer_0.safetensors",
    *RECORDS,
)


def test_every_file_is_in_the_manifest(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "step_2").iterdir()) == sorted(NAMES)
    assert {*manifest.read_manifest(saved / "step_2").files, "manifest.json"} == set(NAMES)


def test_a_damaged_checkpoint_is_passed_over_and_named(saved: Path, alone: Group) -> None:
    assert newest_whole(saved, alone).folder == saved / "step_2"
    for name in NAMES:
        (saved / "step_2" / name).rename(saved / "aside")
        found = newest_whole(saved, alone)
        assert found.folder == saved / "step_1"
        assert list(found.passed_over) == ["step_2"]
        assert name in found.passed_over["step_2"]
        (saved / "aside").rename(saved / "step_2" / name)


def test_weights_alone_are_passed_over(tmp_path: Path, alone: Group) -> None:
    writer = CheckpointWriter(tmp_path, alone, is_async=False, limit=None)
    writer.save(Contents(1, {"model": {"a": torch.ones(1)}}, {}, is_resumable=False))
    assert newest_whole(tmp_path, alone).passed_over == {"step_1": "it holds weights alone (save_only_model)"}


def told_of_a_save(folder: Path, is_async: bool) -> list[tuple[int, int, float]]:
    told: list[tuple[int, int, float]] = []
    tensors = {str(number): torch.ones(100) for number in range(3)}
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        writer = CheckpointWriter(
            folder, group, is_async=is_async, limit=None, report=lambda *share: told.append(share)
        )
        writer.save(Contents(1, {"model": tensors, "optimizer": tensors}, {}))
        writer.wait()
    return told


@pytest.mark.parametrize("is_async", [False, True])
def test_a_save_reports_its_progress(launch, tmp_path: Path, is_async: bool) -> None:
    slow_file = delay(0, 1.0, at=("write", 1, "optimizer_0.safetensors"))
    (told,) = launch(1, told_of_a_save, tmp_path, is_async, faults=[slow_file]).values
    assert told[-1][:2] == (2400, 2400)
    assert any(0 < done < 2400 for done, _, _ in told)
    assert told == sorted(told)


@pytest.mark.world_size(2)
def test_ranks_agree_that_a_checkpoint_is_damaged(ranks) -> None:
    save(ranks.tmp_path)
    if ranks.is_main:
        (ranks.tmp_path / "step_2" / "rank_1.json").unlink()
    ranks.barrier()
    with (
        Group.join(TrainingArguments(use_cpu=True)) as group,
        pytest.raises(CheckpointError, match=r"rank_1\.json is missing"),
    ):
        check(ranks.tmp_path / "step_2", group)


def test_a_checkpoint_of_another_model_is_refused(saved: Path, alone: Group) -> None:
    stored = StoredTensors(saved / "step_2")
    other = build_model("llama_tied", intermediate_size=24)
    with pytest.raises(CheckpointError, match=r"mlp.* is F32 \(24, 32\) here and F32 \(48, 32\)"):
        restore_model(other, stored)
    with pytest.raises(CheckpointError, match="which this model lacks"):
        restore_model(build_model("llama_tied", num_hidden_layers=1), stored)
    with pytest.raises(CheckpointError, match=r"does not hold model.layers.2"):
        restore_model(build_model("llama_tied", num_hidden_layers=3), stored)


def test_an_optimizer_over_other_parameters_is_refused(saved: Path, alone: Group) -> None:
    model, _ = build("adamw", 1, alone)
    fewer = torch.optim.AdamW(list(model.parameters())[1:])
    form, stored = read_json(saved / "step_2" / "optimizer.json"), StoredTensors(saved / "step_2")
    with pytest.raises(CheckpointError, match="parameter groups are not those of this run"):
        restore_optimizer(fewer, model, form, stored, frozenset())
    with pytest.raises(CheckpointError, match="no parameter of the model"):
        pack_optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), model)


def test_state_keeps_the_format_that_its_optimizer_chose(tmp_path: Path, alone: Group) -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight] = {"codes": torch.ones(2, 2, dtype=torch.uint8), "average": torch.full((2, 2), 1 / 3)}
    writer = CheckpointWriter(tmp_path, alone, is_async=False, limit=None)
    writer.save(contents_of(model, optimizer, 1))
    again = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    form, stored = read_json(tmp_path / "step_1" / "optimizer.json"), StoredTensors(tmp_path / "step_1")
    restore_optimizer(again, model, form, stored, frozenset())
    assert {name: value.dtype for name, value in again.state[model.weight].items()} == {
        "codes": torch.uint8,
        "average": torch.float32,
    }


def test_kept_settings_stay_as_built(saved: Path, alone: Group) -> None:
    model, optimizer = build("adamw", 1, alone)
    optimizer.param_groups[0]["lr"] = 7.0
    form, stored = read_json(saved / "step_2" / "optimizer.json"), StoredTensors(saved / "step_2")
    restore_optimizer(optimizer, model, form, stored, frozenset({"lr"}))
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_save_beside_the_training_keeps_what_was(tmp_path: Path, alone: Group) -> None:
    model, optimizer = build("adamw", 0, alone)
    take_steps(model, optimizer)
    before = state_of(model, optimizer)
    writer = CheckpointWriter(tmp_path, alone, is_async=True, limit=None)
    assert writer.save(contents_of(model, optimizer, 2)) is None
    take_steps(model, optimizer)
    assert writer.wait() == tmp_path / "step_2"
    assert writer.wait() is None
    stored = StoredTensors(tmp_path / "step_2")
    assert all(torch.equal(stored.read(name, ()), tensor) for name, tensor in before.items())


def test_a_save_in_flight_says_how_far_it_is(tmp_path: Path, alone: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build("adamw", 0, alone)
    told: list[tuple[int, int, float]] = []
    goes_on, fsync, training = threading.Event(), os.fsync, threading.current_thread()

    def slow(file: int) -> None:
        if threading.current_thread() is not training:
            goes_on.wait()
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    writer = CheckpointWriter(tmp_path, alone, is_async=True, limit=None, report=lambda *said: told.append(said))
    writer.save(contents_of(model, optimizer, 2))
    assert writer.poll() is None
    ((written, planned, _),) = told
    assert 0 <= written <= planned
    goes_on.set()
    assert writer.wait() == tmp_path / "step_2"
    assert told[-1][:2] == (planned, planned)
    assert writer.poll() is None


def test_a_second_save_waits_for_the_first(tmp_path: Path, alone: Group) -> None:
    model, optimizer = build("adamw", 0, alone)
    writer = CheckpointWriter(tmp_path, alone, is_async=True, limit=1)
    for step in (1, 2, 3):
        writer.save(contents_of(model, optimizer, step))
        assert [path.name for path in manifest.list_checkpoints(tmp_path)] == ([f"step_{step - 1}"] if step > 1 else [])
    writer.wait()
    assert [path.name for path in manifest.list_checkpoints(tmp_path)] == ["step_3"]


def save_often(folder: Path, is_async: bool, count: int) -> list[tuple[str, list[str]]]:
    """Save again and again; gives what was raised and what lies there after each time."""
    seen = []
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        model, optimizer = build("adamw", 0, group)
        take_steps(model, optimizer, 1)
        writer = CheckpointWriter(folder, group, is_async=is_async, limit=1)
        for step in range(1, count + 1):
            said = ""
            try:
                writer.save(contents_of(model, optimizer, step))
                while is_async and writer.poll() is None:
                    pass
            except CheckpointError as error:
                said = str(error)
            group.barrier()
            seen.append((said, sorted(path.name for path in folder.iterdir())))
            group.barrier()
    return seen


WRITTEN = {  # by each rank, in this order
    0: (
        "model_0.safetensors",
        "optimizer_0.safetensors",
        "rank_0.json",
        *RECORDS,
        "optimizer.json",
        "tensors.json",
        "manifest.json",
    ),
    1: ("model_1.safetensors", "optimizer_1.safetensors", "rank_1.json"),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["in the loop", "beside it"])
@pytest.mark.parametrize("point", ["write", "sync"])
@pytest.mark.parametrize("rank", WRITTEN)
def test_a_full_disk_at_each_file_in_turn_leaves_the_last_checkpoint(
    launch, tmp_path: Path, rank: int, point: str, is_async: bool
) -> None:
    """One save goes well; the next fails at its last file, the one after it at the last but one, and so on."""
    faults = [disk_full(rank, at=(point, save, name)) for save, name in enumerate(reversed(WRITTEN[rank]), 2)]
    count = len(faults) + 2
    faults.append(disk_full(0, at=("rename", 1, f"step_{count}")))
    first, second = launch(2, save_often, tmp_path, is_async, count + 1, faults=faults).values
    assert first == second
    whole, *failed, last = first
    assert (whole, last) == (("", ["step_1"]), ("", [f"step_{count + 1}"]))
    for said, names in failed:
        assert "No space left on device" in said
        assert names == ["step_1"]
    assert [said.partition("failed: ")[2][:6] for said, _ in failed] == [f"rank {rank}"] * (count - 2) + ["rank 0"]
    newest = tmp_path / f"step_{count + 1}"
    assert {path.name for path in newest.iterdir()} == {name for names in WRITTEN.values() for name in names}
    assert find_damage(newest) == []


def test_a_checkpoint_is_exported_bit_for_bit(tmp_path: Path) -> None:
    samples = random_token_samples([6] * 8)
    trainer = build_trainer(tmp_path, samples, tiny_llama(), save_strategy="steps", save_steps=2, export_final=True)
    trainer.train()
    assert main(["export", str(tmp_path / "checkpoints" / "step_2"), str(tmp_path / "exported")]) == 0
    exported, found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(found.values()), found  # no key is missing, unexpected or of another shape
    weights = weights_of(exported)
    assert all(torch.equal(weights[name], expected) for name, expected in weights_of(trainer.model).items())
    assert main(["export", str(tmp_path / "checkpoints"), str(tmp_path / "again")]) == 2
