"""The command line: help, typos, exit codes, and what each command shows."""

import dataclasses
import importlib.util
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_callback import TrainerControl

from tests.fixtures.corpora import write_chats, write_malformed, write_tokens
from tests.fixtures.models import save_model
from tests.fixtures.runs import as_words, chat_job
from tests.fixtures.tokenizers import build_tokenizer
from tests.shape.source import ROOT
from trainer.cli.init import RECIPES
from trainer.cli.logs import level_in, logs_on_stderr
from trainer.cli.main import COMMANDS, main, report_errors
from trainer.cli.parse import HELP_WIDTH, parse
from trainer.cli.train import LaunchArguments
from trainer.config.arguments import Seq2SeqTrainingArguments, TrainingArguments
from trainer.config.groups import GROUPS, IN_ORDER_OF_USE
from trainer.config.rules import COMMAND_RULES, check_data_kind
from trainer.errors import PeerError, UsageError
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


def test_the_command_line_without_a_command_shows_the_usage_and_fails() -> None:
    assert main([]) == 2


def test_a_typo_in_a_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


ADVICE = [
    (["--lerning-rate", "1"], "unknown option --lerning-rate: did you mean --learning-rate?"),
    (["--lr=1"], "unknown option --lr: here it is --learning-rate"),
    (
        ["--deepspeed", "x.json"],
        "--deepspeed: this option of transformers is not supported; weights are always",
    ),
    (["--warmup-ratio", "0.1"], "--warmup-ratio is a former option of transformers; now warmup_steps, below 1"),
    (["--load-in-4bit"], "unknown option --load-in-4bit: quantised weights cannot be trained or adapted"),
    (["--bf16", "True"], "--bf16 takes no value, found 'True': write --bf16, or --no-bf16"),
    (["--no-bf16=1"], "--no-bf16 takes no value, found '1'"),
    (["--batch_size", "x"], "batch_size = 'x': expected a whole number"),
    (["--batch-size"], "--batch-size: expected one argument"),
    (["--eval-strategy", "often"], "eval_strategy = 'often': expected one of no, steps, epoch"),
    (["--lr-scheduler-kwargs", "{"], "'{' is not JSON"),
    (["--optim", "adamw"], "optim = 'adamw': did you mean 'adamw_torch'? expected one of adamw_torch, "),
    (["--lr-scheduler-type=cosin"], "lr_scheduler_type = 'cosin': did you mean 'cosine'?"),
    (["--optim", "stable_adamw"], "pip install 'reference-trainer[optimizers]'"),
    (["--per-device-train-batch-size=4"], "per_device_train_batch_size has no effect on token data"),
    (["--eval-steps", "5"], "eval_steps has no effect with eval_strategy=no: say eval_strategy=steps"),
    (["--validation-split", "0.1"], "validation_split has no effect without evaluations: set eval_strategy"),
    (["--eval-at-end"], "evaluation needs held-out data: give validation_split or validation_data_path"),
    (["--data-path", "README.m"], "data_path = 'README.m': there is no such file or folder; did you mean 'README.md'?"),
    (["--data-path=README.md", "--model-name-or-path=./no"], "model_name_or_path = './no': there is no such folder"),
    (["--data-path=README.md", "--resume-from-checkpoint=x"], "resume_from_checkpoint = 'x': there is no such folder"),
    (["--log-level", "loud"], "log_level = 'loud': expected one of debug, info, warning, error"),
    (["--bf16", "more"], "'more' belongs to no option"),
]


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(("words", "said"), ADVICE, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_mistake_gets_advice_and_train_and_plan_refuse_the_same(
    command: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no optional package is installed
    assert main([command, *words]) == (1 if "pip install" in said else 2)
    captured = capsys.readouterr()
    assert captured.err.startswith("trainer: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


OTHER_COMMANDS = [  # words, and what is said; a mistake that costs no look into a model
    ("evaluate ./no", "model = './no': there is no such folder"),
    ("evaluate Qwen/Qwen2.5-0.5B --data-path READM.md", "did you mean 'README.md'?"),
    ("evaluate ./no --train-on user", "train_on = 'user': expected one of assistant, all, last"),
    ("generate ./no --prompt a", "models = './no': there is no such folder"),
    ("verify output", "folder = 'output': there is no such folder"),
    ("export outputs/run/no merged", "source = 'outputs/run/no': there is no such folder"),
    ("replay crash/step_9", "folder = 'crash/step_9': there is no such folder"),
    ("prepare chats.jsonl", "chats.jsonl is data by its name, and a file of options is expected: give it as data_path"),
]


def errors_page() -> Any:
    spec = importlib.util.spec_from_file_location("time_mistakes", ROOT / "docs" / "time_mistakes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_errors_says_what_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    script = errors_page()
    script.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no optional package is installed
    assert len(script.MISTAKES) == 10
    for mistake, command in script.MISTAKES.items():
        code = main(shlex.split(command)[1:])
        assert code == (1 if "package" in mistake else 2)
        said = capsys.readouterr().err.removeprefix("trainer: error: ").strip()
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {mistake} |")]
        assert row.startswith(f"| {mistake} | `{command}` | ")
        assert row.endswith(f" | {code} | {script.shortened(said)} |")


@pytest.mark.parametrize(("words", "said"), OTHER_COMMANDS, ids=lambda value: value)
def test_other_commands_give_advice_too(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_mistakes_are_found_before_torch_is_imported() -> None:
    jobs = [["train", *words] for words, _ in ADVICE] + [words.split() for words, _ in OTHER_COMMANDS]
    code = f"""
import sys
from trainer.cli.main import main
codes = {{main(words) for words in {jobs!r}}}
print(codes, sorted({{"torch", "transformers", "tyro"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" []\n")


def test_an_error_that_every_rank_finds_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, told in ((0, True), (1, False)):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        words = [sys.executable, "-m", "trainer", "train", "--lr", "1"]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
        assert (done.returncode, "--learning-rate" in done.stderr) == (2, told)


def test_a_flag_that_leaves_options_of_the_file_idle_is_taken_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("eval_strategy: steps\neval_steps: 5\nexport_best: true\nmetric_for_best_model: exact_match\n")
    args, _ = parse("train", [str(file), "--eval-strategy", "no"], GROUPS, LaunchArguments, "")
    assert args == TrainingArguments()
    notes = capsys.readouterr().err.splitlines()
    assert notes[0].startswith(f"trainer: note: flags leave eval_steps of {file} without effect: eval_steps has no")
    assert len(notes) == 3
    with pytest.raises(UsageError, match="eval_steps has no effect"):  # both from the command line
        parse("train", [str(file), "--eval-strategy=no", "--eval-steps=3"], GROUPS, LaunchArguments, "")
    file.write_text("eval_at_end: true\neval_exact_match: true\nvalidation_split: 0.5\n")
    args, _ = parse("train", [str(file), "--no-eval-at-end"], GROUPS, LaunchArguments, "", COMMAND_RULES)
    assert args == TrainingArguments()
    file.write_text("eval_exact_match: true\n")
    with pytest.raises(UsageError, match="eval_exact_match has no effect"):  # whatever the flags say
        parse("train", [str(file), "--bf16"], GROUPS, LaunchArguments, "", COMMAND_RULES)
    file.write_text("eval_steps: 5\n")
    with pytest.raises(UsageError, match=r"run\.yaml: eval_steps has no effect"):  # the file contradicts itself
        parse("train", [str(file), "--eval-strategy=no"], GROUPS, LaunchArguments, "")


def test_the_help_fits_on_a_screen_and_says_where_the_rest_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 30
    assert all(len(line) <= HELP_WIDTH for line in shown)
    assert "--help-all" in shown[-1]


def test_the_whole_help_lists_every_option_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    shown = capsys.readouterr().out
    names = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    own = ["--nproc-per-node", "--profile", "--log-level"]
    assert names == [f"--{f.name.replace('_', '-')}" for g in IN_ORDER_OF_USE for f in dataclasses.fields(g)] + own
    assert "None" not in shown
    assert {*GROUPS} == {*IN_ORDER_OF_USE}


def test_the_folder_of_a_run_given_as_a_model_says_which_folder_holds_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", write_tokens(tmp_path / "ids.jsonl", [8])
    words = ["train", f"--data-path={data}", f"--model-name-or-path={run}"]
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    assert main(words) == 2
    assert f"the folder of a run that exported no weights: `trainer export {run} FOLDER`" in capsys.readouterr().err
    for samples in (9, 10):
        (run / "hf_format" / f"samples_{samples}").mkdir(parents=True)
        (run / "hf_format" / f"samples_{samples}" / "config.json").touch()
    assert main(words) == 2
    assert f"its newest weights are in '{run}/hf_format/samples_10'" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "level"), [([], 20), (["--log-level", "debug"], 10), (["--log_level=error"], 40)])
def test_the_log_level_is_that_of_the_package(words: list[str], level: int, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("trainer")
    before = logger.level, list(logger.handlers)
    with logs_on_stderr(level_in(words)):
        assert logger.level == level
        logger.error("what is wrong")
        logger.debug("what is not")
    assert "ERROR what is wrong\n" in capsys.readouterr().err
    assert (logger.level, list(logger.handlers)) == before


def test_what_packages_tell_each_other_is_not_told_to_whoever_runs_a_command(recwarn: pytest.WarningsRecorder) -> None:
    with logs_on_stderr("info"):
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`dtype` is deprecated", FutureWarning, stacklevel=1)
    warnings.warn("`is_gradient_checkpointing` is deprecated, elsewhere", UserWarning, stacklevel=1)
    told = [str(each.message) for each in recwarn]
    assert told == ["`dtype` is deprecated", "`is_gradient_checkpointing` is deprecated, elsewhere"]


def test_a_typo_in_a_file_gets_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lerning_rate: 1\n")
    assert main(["train", str(file)]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train"], "data_path is missing"),
        (["train", "--data-path=README.md"], "model_name_or_path is missing"),
        (["train", "--data-path=README.md", "--model-config=README.md"], "tokenizer_name_or_path"),
        (["plan"], "data_path is missing"),
        (["prepare"], "data_path is missing"),
        (["preview"], "data_path is missing"),
        (["plan", "--data-path", "README.md", "--world-size", "0"], "world_size"),
        (["plan", "--data-path", "README.md", "--world-size", "4", "6", "--replicate", "4"], "replicate = 4: 6 ranks"),
        (["export", "nowhere", "there"], "nowhere"),
        (["export", "nowhere"], "TARGET is missing: `trainer export --help`"),
        (["verify", "--fast"], "unknown option --fast"),
        (["report"], "FOLDERS is missing"),
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
    assert re.search(
        r"roles: assistant: \d+ messages, \d+ trained tokens, \d+ trained turns; .*user: \d+ messages", caplog.text
    )


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
        (["--validation-split=0.5"], "validation_split has no effect without evaluations"),
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--serialized-callbacks=x"], "unknown option --serialized-callbacks: pickled callbacks are never executed"),
        (["--lr=1"], "unknown option --lr: here it is --learning-rate"),
        (["--max-epoch=1"], "unknown option --max-epoch: did you mean --max-epochs?"),
        (
            ["--data-path=x"],
            "--batch-size, --max-tokens-per-gpu, --learning-rate, --output-dir are missing",
        ),
    ],
)
def test_flags_of_mini_trainer_get_the_same_advice(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_errors(run_mini_trainer, words) == 2
    assert said in capsys.readouterr().err


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


def test_a_line_of_progress_has_rate_memory_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.cli.progress import ProgressDisplay
    from trainer.training.callbacks import RunState
    from trainer.training.metrics import StepReport

    state = RunState(is_world_process_zero=True, max_steps=9)
    report = StepReport(1, 0.5, 1e-3, 1.0, 2.5, 4, 1, 8.0, 0.0, 0.5, 3 * 2**29)
    ProgressDisplay().on_step_end(TrainingArguments(), state, TrainerControl(), report=report)
    full = dataclasses.replace(report, tokens_per_second=1234.0, mfu=0.42, seconds_left=3725.0)
    ProgressDisplay().on_step_end(TrainingArguments(), state, TrainerControl(), report=full)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/9  epoch 0.50  loss 2.5000  lr 1.00e-03  1.5 GiB",
        "step 1/9  epoch 0.50  loss 2.5000  lr 1.00e-03  1,234 tokens/s  MFU 42%  1.5 GiB  1:02:05 left",
    ]


@pytest.mark.parametrize(("num_steps", "is_profiled"), [(2, False), (3, True), (6, True)])
def test_profiled_steps_leave_a_trace_and_a_table(tmp_path: Path, num_steps: int, is_profiled: bool) -> None:
    from trainer.cli.progress import ProfileSteps
    from trainer.training.callbacks import RunState

    args, state, control = TrainingArguments(output_dir=str(tmp_path)), RunState(), TrainerControl()
    state.is_world_process_zero = True
    callback = ProfileSteps(2)
    callback.on_train_begin(args, state, control)
    for step in range(1, num_steps + 1):
        callback.on_step_begin(args, state, control)
        torch.ones(2, 2) @ torch.ones(2, 2)
        state.global_step = step
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    assert (tmp_path / "profile" / "trace.json").is_file() == is_profiled
    if is_profiled:
        assert "aten::mm" in (tmp_path / "profile" / "operations.txt").read_text()


def test_pairs_of_names_and_values_are_as_good_as_json() -> None:
    for given in ("min_lr=1e-6,num_cycles=2", '{"min_lr": 1e-6, "num_cycles": 2}'):
        args, _ = parse("train", ["--lr-scheduler-kwargs", given], GROUPS, LaunchArguments, "")
        assert args.lr_scheduler_kwargs == {"min_lr": 1e-6, "num_cycles": 2}


@pytest.mark.parametrize("recipe", RECIPES)
def test_init_writes_a_file_that_is_accepted_as_it_stands_and_with_each_line_switched_on(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(f"{recipe}.yaml")
    assert main(["init", recipe]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    text = file.read_text()

    def parsed() -> TrainingArguments:
        if recipe == "seq2seq":
            return Seq2SeqTrainingArguments.from_yaml(file)
        return parse("train", [str(file)], GROUPS, LaunchArguments, "")[0]

    args = parsed()
    assert {name: getattr(args, name) for name in RECIPES[recipe].options} == RECIPES[recipe].options
    check_data_kind(args, "custom data set" if recipe == "seq2seq" else "token data")
    lines = text.splitlines()
    offered = [line for line in lines if re.match(r"#\w+: ", line)]
    assert len(offered) == len(RECIPES[recipe].offered)
    for line in offered:
        file.write_text(text.replace(f"\n{line}\n", f"\n{line[1:]}\n"))
        assert parsed() == args
    assert all(len(line) <= 100 for line in lines)
    assert main(["init", recipe]) == 2
    assert f"{file} is there already" in capsys.readouterr().err
