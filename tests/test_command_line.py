"""The command line: help, typos, exit codes, and what each command shows."""

import json
from pathlib import Path

import pytest

from tests.fixtures.corpora import write_chats, write_malformed, write_tokens
from tests.fixtures.models import save_model
from tests.fixtures.runs import as_words, chat_job
from tests.fixtures.tokenizers import build_tokenizer
from trainer.cli.main import COMMANDS, main, report_errors
from trainer.config.arguments import TrainingArguments
from trainer.errors import PeerError
from trainer.mini_trainer import run as run_mini_trainer


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer, as a Hugging Face folder."""
    save_model(tmp_path / "model", vocab_size=320)
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"trainer {name}" in capsys.readouterr().out


def test_without_a_command_it_shows_the_usage_and_fails() -> None:
    assert main([]) == 2


def test_a_typo_in_a_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_a_typo_in_a_flag_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--lerning-rate", "1"])
    assert stopped.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_a_typo_in_a_file_gets_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lerning_rate: 1\n")
    assert main(["train", str(file)]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train"], "model_name_or_path is missing"),
        (["train", "--model-config", "x"], "tokenizer_name_or_path"),
        (["plan"], "data_path is missing"),
        (["prepare"], "data_path is missing"),
        (["preview"], "data_path is missing"),
        (["plan", "--data-path", "x.jsonl", "--world-size", "0"], "world_size"),
        (["export", "nowhere", "there"], "nowhere"),
        (["train", "--lr-scheduler-kwargs", "{"], "JSON"),
        (["train", "--optim", "adamw_torch_fusd"], "nearest: adamw_torch_fused"),  # before any file is read
    ],
    ids=str,
)
def test_wrong_usage_is_a_message_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_broken_line_is_named_and_code_1(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_malformed(tmp_path / "broken.jsonl", line=3)
    words = [f"--data-path={file}", f"--model-name-or-path={model_folder}", f"--data-cache-dir={tmp_path / 'cache'}"]
    assert main(["prepare", *words]) == 1
    assert f"{file}:3" in capsys.readouterr().err


def test_prepare_reports_what_is_in_the_data(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_chats(tmp_path / "chats.jsonl", 7)
    words = [f"--data-path={file}", f"--model-name-or-path={model_folder}", f"--data-cache-dir={tmp_path / 'cache'}"]
    assert main(["prepare", *words]) == 0
    shown = capsys.readouterr().out
    assert "messages" in shown
    assert "7" in shown
    assert main(["prepare", *words]) == 0
    assert "found prepared" in capsys.readouterr().out


def test_plan_needs_no_tokenizer_for_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_tokens(tmp_path / "tokens.jsonl", [10, 20, 30, 40, 50])
    options = ["--batch-size=2", "--max-tokens-per-rank=64", "--packing-cost=tokens", "--num-train-epochs=2"]
    words = [f"--data-path={file}", f"--data-cache-dir={tmp_path / 'cache'}", *options]
    assert main(["plan", *words, "--world-size", "1", "2", "1024"]) == 0
    shown = capsys.readouterr().out
    assert "3 steps an epoch, 6 steps" in shown
    assert "1,024" in shown


def test_export_writes_another_type(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "half"
    assert main(["export", str(model_folder), str(target), "--save-dtype=bfloat16"]) == 0
    assert str(AutoModelForCausalLM.from_pretrained(target).dtype) == "torch.bfloat16"
    assert len(AutoTokenizer.from_pretrained(target)) == len(AutoTokenizer.from_pretrained(model_folder))


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """A run over chats, in the words of the command line."""
    options = {"output_dir": tmp_path / "run", "generation_max_new_tokens": 4}
    return as_words({**chat_job(tmp_path), **options})


def test_train_shows_progress_answers_and_where_things_lie(
    tmp_path: Path, job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--validation-split=0.25", "--eval-on-start", "--eval-at-end", "--num-generation-samples=2"]
    assert main(["train", *job, *extra, "--max-steps=2", "--logging-steps=1", "--eval-exact-match"]) == 0
    shown = capsys.readouterr().out
    for text in ("step 1/2", "step 2/2", "tokens/s", "exact_match", "expected", "finished step 2", str(tmp_path)):
        assert text in shown.replace("\n", "") or text in shown


def test_train_says_what_it_leaves_out(tmp_path: Path, job: list[str], caplog: pytest.LogCaptureFixture) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "yes"}]}
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write(json.dumps(long | {"rating": 5}) + "\n")
    assert main(["train", *job, "--max-steps=1", "--overlong=drop"]) == 0
    assert "chats.jsonl: overlong dropped: 1, tokens dropped: " in caplog.text
    assert "ignored field 'rating': 1" in caplog.text


def test_answers_need_chats(tmp_path: Path, job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "one two"}\n{"text": "three four"}\n')
    words = [*job, f"--data-path={file}", "--validation-split=0.5", "--eval-at-end", "--eval-exact-match"]
    assert main(["train", *words, "--max-steps=1"]) == 2
    assert "not for 'text' data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval-exact-match"], "eval_exact_match has no effect without evaluations: set eval_strategy"),
        (["--num-generation-samples=2"], "num_generation_samples needs held-out chats"),
        (["--validation-split=0.5"], "validation_split and validation_data_path have no effect without evaluations"),
    ],
    ids=["exact match", "samples", "data"],
)
def test_held_out_data_is_used(job: list[str], capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["train", *job, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_rank_says_nothing_where_its_peer_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: object) -> int:
        raise PeerError("see the other's message")

    assert report_errors(stopped, []) == 1
    assert capsys.readouterr().err == ""


def test_flags_of_mini_trainer_run_resume_and_take_remedies(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tokens(tmp_path / "ids.jsonl", [8] * 8 + [60])
    paths = [f"--model-name-or-path={model_folder}", f"--data-path={data}", f"--output-dir={tmp_path / 'run'}"]
    words = [*paths, "--batch-size=4", "--max-tokens-per-gpu=32", "--learning-rate=1e-3", "--training-mode=step"]
    limits = ["--max-steps=2", "--on-demand-checkpointing"]
    assert report_errors(run_mini_trainer, words) == 2
    assert "training_mode=step needs max_steps" in capsys.readouterr().err
    assert report_errors(run_mini_trainer, [*words, *limits]) == 1
    assert "60 tokens" in capsys.readouterr().err
    assert report_errors(run_mini_trainer, [*words, *limits, "--overlong=drop"]) == 0
    assert report_errors(run_mini_trainer, [*words, *limits, "--overlong=drop"]) == 0  # started again, as it is
    assert not (tmp_path / "run" / "checkpoints.1").exists()


@pytest.mark.parametrize("flag", ["--serialized-callbacks=x"])
def test_a_flag_of_mini_trainer_that_is_left_out_says_why(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(run_mini_trainer, [flag]) == 2
    assert (
        f"{flag.partition('=')[0].replace('-', '_').replace('__', '--', 1)} is not supported" in capsys.readouterr().err
    )


def test_what_takes_long_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.cli.progress import ProgressDisplay
    from trainer.training.callbacks import RunState

    display, args, state = ProgressDisplay(), TrainingArguments(), RunState(is_world_process_zero=True, saved_step=6)
    for done, seconds in ((10, 1.0), (25, 3.0), (26, 4.0), (75, 15.0), (100, 16.0)):
        display.on_write(args, state, done, 100, seconds)
    assert capsys.readouterr().out.splitlines() == [
        "saving step 6: 25%, about 9 s left",
        "saving step 6: 75%, about 5 s left",
    ]
    display.on_decompose(args, state, 1, 4, 3.0)
    display.on_decompose(args, state, 4, 4, 12.0)
    assert capsys.readouterr().out == "decomposed the matrices in 12.0 s\n"
