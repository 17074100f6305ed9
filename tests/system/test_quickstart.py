"""The README's first command: it runs, and the model learns its skills."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.shape.source import ROOT

GOAL = 0.9  # share of held-out chats answered exactly


def run(folder: Path, *extra: str) -> tuple[str, list[dict[str, Any]]]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trainer",
            "train",
            "examples/quickstart.yaml",
            f"--output-dir={folder / 'run'}",
            *extra,
        ],
        cwd=ROOT,
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, [line for line in lines if "eval_exact_match" in line]


def test_the_quickstart_runs(tmp_path: Path) -> None:
    shown, evaluations = run(tmp_path, "--max-steps=2", "--eval-steps=2")
    assert [line["step"] for line in evaluations] == [0, 2]
    assert evaluations[0]["eval_exact_match"] == 0
    assert "held-out chats" in shown


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_learns(tmp_path: Path) -> None:
    _, evaluations = run(tmp_path)
    assert evaluations[0]["eval_exact_match"] == 0
    assert evaluations[-1]["eval_exact_match"] > GOAL
