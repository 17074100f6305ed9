"""Runs report to trackers for real: what the log history has is read back from the files that they wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.fixtures.runs import as_words, chat_job
from tests.fixtures.tolerances import CLOSED_FORM_FP32
from tests.trainer.trainer_test_utils import get_regression_trainer
from trainer.errors import MissingPackageError, UsageError
from trainer.mini_trainer import run as run_mini_trainer
from trainer.training.callbacks import reporters

BLOCK, PIECE_HEADER, LAST_PIECES = 32768, 7, (1, 4)  # of wandb's files
RUN = {"num_train_epochs": 1, "logging_steps": 2, "eval_strategy": "epoch", "run_name": "a run"}
# Their own warnings, and mlflow's word that files are not its favourite store.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """wandb that writes to a folder and asks nobody."""
    package = pytest.importorskip("wandb", reason="wandb is not installed (extra: wandb)")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield package
    package.teardown()


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """mlflow with a store of files."""
    package = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: mlflow)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    package.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield package
    package.set_tracking_uri(None)


def logged(trainer: Any, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in trainer.state.log_history if name in line}


def test_tensorboard_has_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = get_regression_trainer(output_dir=tmp_path, report_to="tensorboard", **RUN)
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for ours, theirs in (("loss", "train/loss"), ("learning_rate", "train/learning_rate"), ("eval_loss", "eval/loss")):
        written = {event.step: event.value for event in events.Scalars(theirs)}
        assert written == pytest.approx(logged(trainer, ours), rel=CLOSED_FORM_FP32)
    (text,) = (events.Tensors(name) for name in events.Tags()["tensors"] if name.startswith("args"))
    assert json.loads(text[0].tensor_proto.string_val[0])["run_name"] == "a run"


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Cut the file of an offline run: blocks of 32 KiB, in them pieces with a header of checksum, length and kind."""
    position, record = 7, b""  # behind the file's own header
    while position < len(data):
        room = BLOCK - position % BLOCK
        if room < PIECE_HEADER:
            position += room
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        position += PIECE_HEADER
        record += data[position : position + length]
        position += length
        if kind in LAST_PIECES:
            yield record
            record = b""


def wandb_history(folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Project and name of an offline run, and its lines."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    named, lines = {}, []
    for data in wandb_records(file.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("run"):
            named = {"project": record.run.project, "name": record.run.display_name}
        if record.HasField("history"):
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return named, lines


def test_wandb_has_what_was_logged(tmp_path: Path, wandb: Any) -> None:
    trainer = get_regression_trainer(output_dir=tmp_path / "run", report_to=["wandb"], **RUN)
    trainer.train()
    wandb.teardown()  # which waits until the file is whole
    named, lines = wandb_history(tmp_path)
    assert named == {"project": "huggingface", "name": "a run"}
    for ours, theirs in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
        assert {line["train/global_step"]: line[theirs] for line in lines if theirs in line} == logged(trainer, ours)


def test_mlflow_has_what_was_logged(tmp_path: Path, mlflow: Any) -> None:
    trainer = get_regression_trainer(output_dir=tmp_path / "run", report_to=["mlflow"], **RUN)
    trainer.train()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "a run"
    assert run.data.params["num_train_epochs"] == "1"
    for name in ("loss", "eval_loss"):
        assert {one.step: one.value for one in client.get_metric_history(run.info.run_id, name)} == logged(
            trainer, name
        )


def test_flags_of_mini_trainer_open_the_trackers(tmp_path: Path, wandb: Any, mlflow: Any) -> None:
    job = {"learning_rate": 1e-3, "output_dir": tmp_path / "run", "training_mode": "step", "max_steps": 2}
    chats = chat_job(tmp_path)
    same = {name: chats[name] for name in ("data_path", "batch_size")}
    model = build_model_folder(tmp_path / "model", tmp_path / "tokenizer")
    flags = {
        "model_name_or_path": model,
        "max_tokens_per_gpu": 512,
        "wandb_project": "a project",
        "wandb_run_name": "first",
        "mlflow_tracking_uri": (tmp_path / "elsewhere").as_uri(),
        "mlflow_experiment_name": "an experiment",
        "mlflow_run_name": "second",
    }
    assert run_mini_trainer(as_words({**job, **same, **flags})) == 0
    wandb.teardown()  # which waits until the file is whole
    assert wandb_history(tmp_path)[0] == {"project": "a project", "name": "first"}
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("an experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "second"


def build_model_folder(folder: Path, tokenizer: Path) -> Path:
    """A tiny model with its tokenizer, as a Hugging Face folder."""
    import shutil

    from tests.fixtures.models import save_model

    save_model(folder, vocab_size=320, max_position_embeddings=512)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.world_size(2)
def test_the_lead_rank_reports_alone(ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    get_regression_trainer(output_dir=tmp_path, report_to="tensorboard", **RUN).train()
    assert (tmp_path / "runs").exists() == ranks.is_main


def test_all_means_what_is_installed_and_none_nothing() -> None:
    assert reporters("none") == reporters(["none"]) == reporters([]) == []
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    assert all(isinstance(callback, TrainerCallback) for callback in reporters("tensorboard"))


def test_what_cannot_report_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="report_to = tensorbord: expected none, all, or some of .*tensorboard"):
        get_regression_trainer(output_dir=tmp_path, report_to="tensorbord")
    with pytest.raises(MissingPackageError, match="report_to = clearml: .*pip install clearml"):
        get_regression_trainer(output_dir=tmp_path, report_to="clearml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"project": "x"}, "no effect without report_to=trackio"),
        ({"metric_improvement_threshold": 0.1}, "has no effect without evaluations"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_regression_trainer(output_dir=tmp_path, **options)


@pytest.mark.parametrize(("threshold", "is_best_late"), [(0.0, True), (1e3, False)])
def test_the_best_is_better_by_the_threshold(tmp_path: Path, threshold: float, is_best_late: bool) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 4, "learning_rate": 0.1, "num_train_epochs": 1}
    trainer = get_regression_trainer(output_dir=tmp_path, metric_improvement_threshold=threshold, **options)
    trainer.train()
    assert (trainer.state.best_global_step == 8) == is_best_late
