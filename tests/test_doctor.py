"""`trainer doctor` and environment.json: what is recorded of the machine is true, and what is wrong is said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.fixtures.runs import build_trainer, random_token_samples
from trainer.cli import doctor
from trainer.cli.main import main
from trainer.training.process import git_commit


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS_OF_TIMING", 0.01)


def test_the_page_is_one_json_object_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--json", "--output-dir", str(tmp_path)]) in (0, 1)
    page = json.loads(capsys.readouterr().out)
    assert page["versions"]["torch"] == torch.__version__
    assert page["machine"]["threads"] == torch.get_num_threads()
    assert page["disk"]["folder"] == str(tmp_path)
    assert page["disk"]["can_be_locked"]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_folder_that_is_not_there_is_a_problem(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--output-dir", str(tmp_path / "missing")]) == 1
    assert "problem: " in capsys.readouterr().out


def test_the_attention_of_a_model_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["doctor", "--output-dir", str(tmp_path), "--model-name-or-path", "examples/quickstart/model", "--json"])
    page = json.loads(capsys.readouterr().out)
    assert page["model"]["architecture"] == "LlamaForCausalLM"
    assert page["model"]["attention"]


def test_a_run_records_where_it_happened(tmp_path: Path) -> None:
    build_trainer(tmp_path, random_token_samples([5, 6]), max_steps=1, seed=7).train()
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["seed"] == 7
    assert record["packages"]["torch"] == torch.__version__
    assert record["command"]


def test_the_commit_of_a_folder_is_that_of_its_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit(tmp_path) == {"commit": head, "is_changed": False}
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == {"commit": head, "is_changed": True}
