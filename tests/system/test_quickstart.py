"""The README's first command: it runs, and the model learns its skills."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.ranks.launch import Launch
from tests.shape.source import ROOT
from trainer.cli.main import main

GOAL = 0.9  # share of held-out chats answered exactly


def command(*words: str) -> int:
    os.chdir(ROOT)
    return main(["train", "examples/quickstart.yaml", *words])


def run(launch: Launch, folder: Path, *extra: str, timeout: float = 100) -> tuple[str, list[dict[str, Any]]]:
    """What the command shows, and its evaluations; at home in a new folder, where nothing is prepared yet."""
    words = (f"--output-dir={folder / 'run'}", *extra)
    (done,) = launch(1, command, *words, group=False, env={"HOME": str(folder)}, timeout=timeout)
    assert done.value == 0, done.log
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return done.log, [line for line in lines if "eval_exact_match" in line]


def test_the_quickstart_runs(launch: Launch, tmp_path: Path) -> None:
    shown, evaluations = run(launch, tmp_path, "--max-steps=2", "--eval-steps=2")
    assert [line["step"] for line in evaluations] == [0, 2]
    assert evaluations[0]["eval_exact_match"] == 0
    assert "held-out chats" in shown


@pytest.mark.learns
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_learns(launch: Launch, tmp_path: Path) -> None:
    _, evaluations = run(launch, tmp_path, timeout=900)
    assert evaluations[0]["eval_exact_match"] == 0
    assert evaluations[-1]["eval_exact_match"] > GOAL
