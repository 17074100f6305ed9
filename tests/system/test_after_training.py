"""What people do after a run: score it, try it, export it, from its folder, a checkpoint or an export."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.fixtures.ranks.launch import Launch
from tests.fixtures.runs import as_words, chat_job, read_metrics
from tests.fixtures.tolerances import LOSS_FP32
from trainer.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on 12 chats, three of them held out, with a checkpoint and an export."""
    folder = tmp_path_factory.mktemp("run")
    options = {**chat_job(folder), "output_dir": str(folder / "out"), "validation_split": 0.25, "max_steps": 2}
    assert main(["train", *as_words(options), "--eval-at-end", "--save-steps=2", "--use-cpu"]) == 0
    return folder / "out"


@pytest.mark.parametrize("place", ["", "checkpoints/step_2", "hf_format/samples_8"])
def test_evaluate_gives_what_the_run_logged(run: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run / place), "--json", "--use-cpu"]) == 0
    measured = json.loads(capsys.readouterr().out)
    logged = [line for line in read_metrics(run) if "eval_loss" in line][-1]
    assert measured["eval_loss"] == logged["eval_loss"]
    assert measured["eval_num_loss_tokens"] == logged["eval_num_loss_tokens"]


@pytest.mark.parametrize("place", ["held-out", "other"])
def test_losses_of_roles_add_up_to_the_whole(run: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data-path", str(run.parent / "chats.jsonl")] if place == "other" else []
    measured = {}
    for train_on in ("all", "assistant"):
        assert main(["evaluate", str(run), *words, "--train-on", train_on, "--json", "--use-cpu"]) == 0
        measured[train_on] = json.loads(capsys.readouterr().out)
    whole, of_assistant = measured["all"], measured["assistant"]
    num_others = whole["eval_num_loss_tokens"] - of_assistant["eval_num_loss_tokens"]
    assert num_others > 0
    assert whole["eval_loss/assistant"] == pytest.approx(of_assistant["eval_loss"], rel=LOSS_FP32)
    together = whole["eval_loss/assistant"] * of_assistant["eval_num_loss_tokens"]
    together += whole["eval_loss/others"] * num_others
    assert together / whole["eval_num_loss_tokens"] == pytest.approx(whole["eval_loss"], rel=LOSS_FP32)


def test_evaluate_scores_answers_on_other_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(run.parent / "chats.jsonl")
    words = ["--data-path", data, "--score-answers", "contains", "--generation-max-new-tokens", "3", "--use-cpu"]
    assert main(["evaluate", str(run), *words, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["eval_num_samples"] == 12
    assert 0 <= measured["eval_contains"] <= 1


def test_generate_answers_a_prompt_by_several_models(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "hello", "--max-new-tokens", "4", "--use-cpu"]
    assert main(["generate", str(run / "checkpoints/step_2"), str(run / "hf_format/samples_8"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.startswith("[")]
    assert titles == [f"[{run / 'checkpoints/step_2'}]", f"[{run / 'hf_format/samples_8'}]"]


def test_generate_answers_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data-path", str(run.parent / "chats.jsonl"), "--max-new-tokens", "4", "--use-cpu"]
    assert main(["generate", str(run), *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12
    assert all({"question", "reference", "answer"} == line.keys() for line in lines)


def said_by_generate(*words: str) -> tuple[int, str]:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(["generate", *words, "--max-new-tokens", "4", "--use-cpu"])
    return code, said.getvalue()


def test_ranks_share_the_chats_of_a_file_and_one_prints(run: Path, launch: Launch) -> None:
    words = (str(run), "--data-path", str(run.parent / "chats.jsonl"))
    (alone,) = launch(1, said_by_generate, *words, group=False).values
    first, second = launch(2, said_by_generate, *words, group=False).values
    assert (first, second) == (alone, (0, ""))
    for code, said in launch(2, said_by_generate, str(run), "--prompt", "a", group=False).values:
        assert code == 2
        assert "one chat is answered by one process, and there are 2: start it without torchrun" in said


def test_generate_chats_in_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nagain\n"))
    assert main(["generate", str(run), "--max-new-tokens", "3", "--temperature", "0.7", "--use-cpu"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "MODELS is missing"),
        (["generate", "x", "--prompt", "a", "--data-path", "b"], "exclude each other"),
        (["generate", "x", "--data-path", "missing.jsonl"], "is no file"),
        (["evaluate"], "MODEL is missing"),
    ],
)
def test_wrong_usage_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_weights_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds neither a config.json, nor hf_format/samples_N or checkpoints of a run" in capsys.readouterr().err
