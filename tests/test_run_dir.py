"""The output folder: two runs never mix in it, nothing foreign in it is removed, and all ranks see the same one."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import save_model, tiny_llama
from tests.fixtures.ranks.faults import flip_bit
from tests.fixtures.runs import build_trainer, random_token_samples, read_metrics
from tests.trainer.trainer_test_utils import get_regression_trainer
from trainer.atomic import read_sealed, write_sealed
from trainer.checkpoint import manifest
from trainer.cli.main import main
from trainer.errors import CheckpointError, UsageError
from trainer.hf.trainer import Trainer
from trainer.training.run_dir import read_run_id

SAMPLES = random_token_samples([5] * 8)


def run(folder: Path, **options: Any) -> Trainer:
    defaults = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "async_save": False}
    return get_regression_trainer(output_dir=folder, disable_tqdm=True, **{**defaults, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step}"


def test_a_run_has_one_id_in_all_that_it_writes(tmp_path: Path) -> None:
    run(tmp_path).train()
    run_id = read_run_id(tmp_path)
    assert run_id is not None
    assert {manifest.read_manifest(at(tmp_path, step)).run_id for step in (2, 4, 6)} == {run_id}
    run(tmp_path, max_steps=8, allow_change=["max_steps"]).train(resume_from_checkpoint=True)
    assert manifest.read_manifest(at(tmp_path, 8)).run_id == run_id == read_run_id(tmp_path)
    run(tmp_path / "other").train()
    assert read_run_id(tmp_path / "other") != run_id


def test_a_checkpoint_of_another_run_touches_nothing(tmp_path: Path) -> None:
    run(tmp_path / "a").train()
    run(tmp_path / "b").train()
    before = contents(tmp_path / "b")
    with pytest.raises(UsageError, match="holds another run than the one that wrote"):
        run(tmp_path / "b").train(resume_from_checkpoint=str(at(tmp_path / "a", 2)))
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    (tmp_path / "b" / "run.json").unlink()
    with pytest.raises(CheckpointError, match="is not the one of the run that wrote the checkpoint"):
        run(tmp_path / "b").train(resume_from_checkpoint=str(at(tmp_path / "a", 2)))
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


def newer(folder: Path) -> None:
    body, _ = read_sealed(folder / "manifest.json")
    write_sealed(folder / "manifest.json", {**body, "format_version": 99})


@pytest.mark.parametrize(
    "spoil", [newer, lambda folder: (folder / "state.json").unlink(), flip_bit], ids=["newer", "file away", "flipped"]
)
def test_what_auto_could_not_read_is_set_aside_and_can_be_had_back(tmp_path: Path, spoil: Any) -> None:
    run(tmp_path).train()
    last = at(tmp_path, 6)
    spoil(last / "manifest.json" if spoil is flip_bit else last)
    before = contents(last)
    run(tmp_path).train(resume_from_checkpoint="auto")
    assert contents(tmp_path / "checkpoints.discarded" / "step_6") == before
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_older_step_sets_the_later_ones_aside_each_under_a_free_name(tmp_path: Path) -> None:
    run(tmp_path).train()
    for _ in range(2):
        run(tmp_path).train(resume_from_checkpoint=str(at(tmp_path, 2)))
    aside = sorted(path.name for path in (tmp_path / "checkpoints.discarded").iterdir())
    assert aside == ["step_4", "step_4.1", "step_6", "step_6.1"]


class TestOverwriting:
    def test_a_run_of_ours_is_removed(self, tmp_path: Path) -> None:
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "export_final": True}
        for _ in range(2):
            build_trainer(tmp_path, SAMPLES, tiny_llama(), **options, overwrite_output_dir=True).train()
        names = {path.name for path in tmp_path.iterdir()}
        assert {"checkpoints", "hf_format", "metrics.jsonl", "run.json"} <= names
        assert not [name for name in names if ".1" in name]

    def test_a_linked_folder_is_set_aside_whole(self, tmp_path: Path) -> None:
        run(tmp_path / "run").train()
        (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
        (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
        before = contents(tmp_path / "elsewhere")
        run(tmp_path / "run", overwrite_output_dir=True).train()
        assert contents(tmp_path / "elsewhere") == before
        assert (tmp_path / "run" / "checkpoints.1").is_symlink()

    def test_foreign_files_are_set_aside(self, tmp_path: Path) -> None:
        run(tmp_path).train()
        (tmp_path / "hf_format" / "mine").mkdir(parents=True)
        (tmp_path / "hf_format" / "mine" / "weights").write_text("x")
        (at(tmp_path, 4) / "adapter.bin").write_text("x")
        run(tmp_path, overwrite_output_dir=True).train()
        assert (tmp_path / "hf_format.1" / "mine" / "weights").read_text() == "x"
        assert (tmp_path / "checkpoints.1" / "step_4" / "adapter.bin").read_text() == "x"

    def test_a_checkpoint_that_was_being_written_goes_with_its_run(self, tmp_path: Path) -> None:
        run(tmp_path).train()
        half = tmp_path / "checkpoints" / f".step_8.writing-{read_run_id(tmp_path)}"
        half.mkdir()
        run(tmp_path, overwrite_output_dir=True).train()
        assert not half.exists()
        assert not (tmp_path / "checkpoints.1").exists()


class TestExports:
    def test_a_folder_with_a_config_and_sources_is_refused(self, tmp_path: Path) -> None:
        save_model(tmp_path / "model")
        project = tmp_path / "project"
        project.mkdir()
        (project / "config.json").write_text("{}")
        (project / "main.py").write_text("print()")
        assert main(["export", str(tmp_path / "model"), str(project)]) == 2
        assert sorted(path.name for path in project.iterdir()) == ["config.json", "main.py"]

    def test_an_export_replaces_an_export(self, tmp_path: Path) -> None:
        save_model(tmp_path / "model")
        for _ in range(2):
            assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
        (tmp_path / "out" / "notes.txt").write_text("x")
        assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
        assert (tmp_path / "out" / "notes.txt").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def train_in_own_folder(folder: Path) -> None:
    """Each rank stands in a folder of its own, as on two nodes without a shared disk."""
    own = folder / os.environ["RANK"]
    own.mkdir()
    os.chdir(own)
    run(Path("out"), use_cpu=True).train()


def test_a_folder_that_ranks_do_not_share_is_named_before_the_first_step(launch: Any, tmp_path: Path) -> None:
    for outcome in launch(2, train_in_own_folder, tmp_path):
        assert isinstance(outcome.error, UsageError)
        assert "rank 1: output_dir = 'out' is not the folder that rank 0 writes to" in str(outcome.error)
    assert not (tmp_path / "0" / "out" / "metrics.jsonl").exists()


def test_a_disk_too_small_for_a_checkpoint_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    run(tmp_path, max_steps=1).train()
    assert "0.0 GB free, and a checkpoint takes about" in caplog.text
