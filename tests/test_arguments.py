"""TrainingArguments: one meaning from Python, YAML and the command line; nothing unknown or without effect passes."""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.cli.parse import parse
from trainer.cli.train import LaunchArguments
from trainer.config.arguments import TrainingArguments, names_free_at_resume
from trainer.config.choices import check_choices
from trainer.config.groups import GROUPS
from trainer.config.suggest import nearest
from trainer.errors import MissingPackageError, UsageError

VALID: dict[str, Any] = {
    "data_path": "some data.jsonl",
    "learning_rate": 1e-4,
    "num_train_epochs": 2.5,
    "max_steps": 7,
    "bf16": True,
    "freeze_patterns": ["embed", r"layers\.0\."],
    "lr_scheduler_kwargs": {"min_lr": 0.1},
    "save_dtype": "bfloat16",
    "max_tokens": 10**9,
    "warmup_steps": 0.1,
}


def as_words(options: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *value]
        else:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def from_words(words: list[str]) -> TrainingArguments:
    return parse("train", words, GROUPS, LaunchArguments, "")[0]


@given(names=st.sets(st.sampled_from(sorted(VALID))))
def test_python_yaml_and_command_line_agree(names: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    options = {name: VALID[name] for name in sorted(names)}
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(yaml.safe_dump(options))
    expected = TrainingArguments(**options)
    assert TrainingArguments.from_yaml(file) == expected
    assert from_words(as_words(options)) == expected
    assert TrainingArguments.from_mapping(json.loads(expected.to_json_string())) == expected


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nbatch_size: 8\n")
    args = from_words([str(file), "--batch-size", "3"])
    assert (args.learning_rate, args.batch_size) == (1e-4, 3)


def test_every_option_says_what_it_is_and_belongs_to_one_group() -> None:
    fields = dataclasses.fields(TrainingArguments())
    assert all(field.metadata["help"].endswith(".") or "(" in field.metadata["help"] for field in fields)
    grouped = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert grouped == [field.name for field in fields]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1}, "unknown option 'lerning_rate': did you mean 'learning_rate'"),
        ({"zzzz": 1}, "unknown option 'zzzz'"),
        ({"batch_size": 0}, "batch_size = 0: must be above 0"),
        ({"batch_size": 2.5}, "batch_size = 2.5: expected a whole number"),
        ({"batch_size": True}, "expected a whole number"),
        ({"bf16": "yes"}, "bf16 = 'yes': expected true or false"),
        ({"train_on": "user"}, "expected one of assistant, all, last"),
        ({"validation_split": 1.0}, "must be below 1"),
        ({"learning_rate": "fast"}, "learning_rate = 'fast': expected a number"),
        ({"freeze_patterns": "embed"}, "freeze_patterns"),
        ({"max_steps": 0}, "would train nothing"),
        ({"model_config": "a", "model_name_or_path": "b"}, "exclude each other"),
        ({"validation_split": 0.1, "validation_data_path": "x"}, "exclude each other"),
        ({"data_path": "x", "validation_data_path": "x"}, "must not be trained on"),
        ({"eval_steps": 5}, "has no effect with eval_strategy=no"),
        ({"eval_strategy": "steps", "eval_steps": 2.5}, "eval_steps = 2.5: expected a whole number, or a share"),
        ({"logging_steps": 1.5}, "logging_steps = 1.5: expected a whole number, or a share"),
        ({"eval_delay": 5}, "eval_delay has no effect with eval_strategy=no"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "exclude each other"),
        ({"export_best": True}, "needs evaluations to choose by"),
        ({"greater_is_better": True}, "no effect without evaluations"),
        ({"output_dir": ""}, "output_dir = '': expected text that is not empty"),
        ({"data_path": "a\0b"}, "expected text"),
        ({"learning_rate": math.inf}, "learning_rate = inf: must be below inf"),
        ({"weight_decay": math.inf}, "must be below inf"),
        ({"adam_epsilon": math.inf}, "must be below inf"),
        ({"warmup_steps": math.inf}, "must be below inf"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"seed": 2**32}, "seed = 4294967296: must be at most 4294967295"),
        ({"batch_size": 10**30}, "must be at most"),
        ({"max_tokens_per_rank": 2**31}, "must be at most"),
        ({"max_samples": 2**63}, "must be at most"),
        ({"max_length": 65, "max_tokens_per_rank": 64}, "max_length = 65 is more than max_tokens_per_rank = 64"),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "warmup_steps has no effect"),
        ({"logging_first_step": True, "logging_strategy": "epoch"}, "logging_first_step has no effect"),
        ({"max_tokens_per_rank": 6, "max_tokens_per_gpu": 5}, "max_tokens_per_gpu is another name"),
        ({"max_tokens_per_gpu": 5, "max_tokens_per_rank": 6}, "is another name of max_tokens_per_rank"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingArguments(**options)


@pytest.mark.parametrize(
    ("name", "given", "num_steps", "expected"),
    [
        ("warmup_steps", 0, None, 0),
        ("warmup_steps", 1, None, 1),
        ("warmup_steps", 5, 9, 5),
        ("warmup_steps", 0.5, 9, 5),
        ("logging_steps", 7, -1, 7),
        ("logging_steps", 7, 9, 7),
        ("logging_steps", 1, 9, 1),
        ("logging_steps", 0.5, 9, 5),
    ],
)
def test_below_1_steps_are_a_share(name: str, given: float, num_steps: int | None, expected: int) -> None:
    args = TrainingArguments(**{name: given})
    steps = args.get_warmup_steps(num_steps) if name == "warmup_steps" else args.in_steps(name, num_steps or -1)
    assert steps == expected
    with pytest.raises(UsageError, match="is a share of all steps"):
        TrainingArguments(warmup_steps=0.5).get_warmup_steps(None)
    with pytest.raises(UsageError, match="is a share of all steps, which are not known"):
        TrainingArguments(logging_steps=0.5).in_steps(name="logging_steps", max_steps=-1)


def test_choices_are_known_and_their_packages_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_choices("my_module:Own", "cosine", ["none", "my_tracker"], use_liger_kernels=False)
    with pytest.raises(UsageError, match="optim = 'adamw_troch': did you mean 'adamw_torch'"):
        check_choices("adamw_troch", "linear", [], use_liger_kernels=False)
    with pytest.raises(UsageError, match="optim = 'zzz': expected one of"):
        check_choices("zzz", "linear", [], use_liger_kernels=False)
    with pytest.raises(UsageError, match="lr_scheduler_type = 'cosin': did you mean 'cosine'"):
        check_choices("adamw_torch", "cosin", [], use_liger_kernels=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)  # nothing more is installed
    check_choices("adamw_torch", "linear", ["none", "my_tracker"], use_liger_kernels=False)
    for optim, extra in (("stable_adamw", "optimizers"), ("grokadamw", "research-optimizers")):
        with pytest.raises(MissingPackageError, match=rf"optim = '{optim}' needs .*\[{extra}\]"):
            check_choices(optim, "linear", [], use_liger_kernels=False)
    with pytest.raises(MissingPackageError, match=r"report_to = 'wandb' needs .*\[wandb\]"):
        check_choices("adamw_torch", "linear", ["my_tracker", "wandb"], use_liger_kernels=False)
    with pytest.raises(MissingPackageError, match=r"use_liger_kernels needs .*\[gpu\]"):
        check_choices("adamw_torch", "linear", [], use_liger_kernels=True)


def test_aliases_are_understood_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_tokens_per_gpu: 77\n")
    for args in (
        TrainingArguments(max_tokens_per_gpu=77),
        TrainingArguments.from_yaml(file),
        from_words(["--max-tokens-per-gpu=77"]),
        from_words(["--max_tokens_per_gpu", "77"]),
    ):
        assert args.max_tokens_per_rank == args.max_tokens_per_gpu == 77


def test_names_that_may_change_are_given_with_commas_or_spaces() -> None:
    for words in (["--allow-change", "max_steps,data"], ["--allow-change", "max_steps", "data"]):
        assert from_words(words).allow_change == ["max_steps", "data"]


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "a: b: c\n",
        "",
        "1: 2\n",
        "!!python/object/apply:os.getcwd []",
        "seed: 1\nseed: 2\n",
        "seed: " + "9" * 5000,
        "bf16: !!bool maybe",
        "seed: !!timestamp x",
        "seed: 2024-99-99",
        "[" * 5000,
    ],
    ids=lambda text: text[:12],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"run\.yaml"):
        TrainingArguments.from_yaml(file)


def test_no_is_a_choice_in_yaml_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("eval_strategy: no\nlogging_strategy: no\n")
    args = TrainingArguments.from_yaml(file)
    assert (args.eval_strategy, args.logging_strategy) == ("no", "no")


def test_the_range_of_a_commands_own_option_is_checked() -> None:
    with pytest.raises(UsageError, match="nproc_per_node = 0: must be above 0"):
        from_words(["--nproc-per-node=0"])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_give_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_bytes(content)
    with contextlib.suppress(UsageError):  # any other error is a failure
        assert isinstance(TrainingArguments.from_yaml(file), TrainingArguments)


@dataclasses.dataclass
class OwnArguments(TrainingArguments):
    """Options of a script of one's own."""

    flavour: str = "plain"


def test_a_subclass_understands_as_much() -> None:
    args = OwnArguments("out", flavour="sour", activation_checkpointing=True, push_to_hub=False)
    assert (args.output_dir, args.flavour, args.gradient_checkpointing) == ("out", "sour", True)
    assert OwnArguments.from_mapping(args.to_dict()) == args
    with pytest.raises(UsageError, match="unknown option 'flavor': did you mean 'flavour'"):
        OwnArguments(flavor="sour")


def test_a_subclass_without_options_of_its_own_is_as_good() -> None:
    class Plain(TrainingArguments):
        """Adds a method."""

        def doubled(self) -> int:
            return 2 * self.batch_size

    args = Plain("out", data_path="d", batch_size=3)
    assert (args.data_path, args.doubled(), dataclasses.replace(args, batch_size=4).doubled()) == ("d", 6, 8)


def test_scripts_may_ask_for_options_that_are_not_here() -> None:
    args = TrainingArguments(do_train=True)
    assert (args.do_train, args.push_to_hub, args.local_rank, args.log_level) == (True, False, -1, "passive")
    assert (args.log_on_each_node, args.enable_jit_checkpoint) == (False, True)
    assert TrainingArguments(hub_strategy="end").hub_strategy.value == "end"
    with pytest.raises(AttributeError, match="TrainingArguments has no no_such_option"):
        args.no_such_option  # noqa: B018


class TestAssignment:
    """Options that are assigned after construction."""

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("learning_rate", -1, "learning_rate = -1: must be at least 0"),
            ("learning_rat", 1, "unknown option 'learning_rat': did you mean 'learning_rate'?"),
            ("eval_strategy", "sometimes", "eval_strategy = 'sometimes': expected one of no, steps, epoch"),
            ("warmup_ratio", 0.1, "warmup_ratio is a former option of transformers; now warmup_steps, below 1"),
            ("deepspeed", "x.json", "deepspeed: this option of transformers is not supported"),
        ],
    )
    def test_a_wrong_assignment_is_refused_as_a_wrong_argument_is(self, name: str, value: Any, message: str) -> None:
        args = TrainingArguments()
        for assign in (lambda: setattr(args, name, value), lambda: TrainingArguments(**{name: value})):
            with pytest.raises(UsageError) as refused:
                assign()
            assert str(refused.value).startswith(message)
        assert args == TrainingArguments()

    def test_options_assigned_one_after_another_are_checked_together_when_used(self) -> None:
        args = TrainingArguments(eval_strategy="steps")
        args.eval_strategy, args.max_tokens_per_gpu = "no", 77
        args.check()
        assert args == TrainingArguments(max_tokens_per_rank=77)  # what was derived is derived anew
        args.eval_steps = 5
        with pytest.raises(UsageError, match="eval_steps has no effect with eval_strategy=no"):
            args.check()
        args.eval_strategy = "steps"
        args.check()
        assert args.do_eval

    def test_a_copy_is_as_good(self) -> None:
        args = OwnArguments("out", flavour="sour", data_path="d", eval_strategy="steps", freeze_patterns=["a"])
        for made in (dataclasses.replace(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
            assert made == args
            assert (made.data_path, made.freeze_patterns) == ("d", ["a"])
            with pytest.raises(UsageError, match="must be at least 0"):
                made.learning_rate = -1


class TestRecords:
    """Options as checkpoints record them."""

    def test_a_record_of_a_subclass_is_read(self) -> None:
        args = OwnArguments("out", flavour="sour", batch_size=3, eval_strategy="epoch")
        read, rest = TrainingArguments.from_record(json.loads(args.to_json_string()))
        assert (read.batch_size, read.eval_strategy, rest) == (3, "epoch", {"flavour": "sour"})
        assert OwnArguments.from_record(args.to_dict()) == (args, {})

    def test_a_record_of_another_version_is_read(self) -> None:
        record = TrainingArguments(batch_size=3).to_dict()
        del record["learning_rate"]  # an option that it did not have
        former = {"min_samples_per_save": 9, "max_tokens_per_gpu": 77, "gone": True}
        del record["max_tokens_per_rank"]
        other_rules = {"eval_steps": 5, "optim": None}
        read, rest = TrainingArguments.from_record({**record, **former, **other_rules})
        assert (read.min_samples_per_full_checkpoint, read.max_tokens_per_rank, read.eval_steps) == (9, 77, 5)
        assert (read.learning_rate, rest) == (TrainingArguments().learning_rate, {"gone": True, "optim": None})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("adamw", "adamw_torch"), ("cosin", "cosine"), ("adamw_torch_fusd", "adamw_torch_fused"), ("zzz", None)],
)
def test_the_nearest_name_is_the_one_meant(name: str, meant: str | None) -> None:
    assert nearest(name, ["grokadamw", "adamw_torch_fused", "adamw_torch", "cosine_with_restarts", "cosine"]) == meant


def test_every_value_of_a_file_is_read_as_its_options_type(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run_name: 2026-12-01\nlearning_rate: 1e-4\nbf16: yes\nsave_total_limit: null\nnum_train_epochs: inf\n"
        "osft: on\nosft_unfreeze_rank_ratio: 1e-1\nosft_rank_ratios: {a: 1e-1}\nlogging_strategy: no\n"
        "optim_groups: {head: {learning_rate: 1e-5, weight_decay: 0}}\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
        "report_to: [tensorboard]\nfreeze_patterns: [007, on]\nmax_steps: -1\ntrackio_static_space_id: ~\n"
        "lr_scheduler_type: cosine_with_min_lr\nddp_find_unused_parameters: null\n"
    )
    args = TrainingArguments.from_yaml(file)
    assert (
        args.as_given()
        == TrainingArguments(
            run_name="2026-12-01",
            learning_rate=1e-4,
            bf16=True,
            num_train_epochs=math.inf,
            osft=True,
            osft_unfreeze_rank_ratio=0.1,
            osft_rank_ratios={"a": 0.1},
            logging_strategy="no",
            optim_groups={"head": {"learning_rate": 1e-5, "weight_decay": 0}},
            lr_scheduler_kwargs={"min_lr": 1e-6},
            report_to=["tensorboard"],
            freeze_patterns=["007", "on"],
            lr_scheduler_type="cosine_with_min_lr",
        ).as_given()
    )


def test_what_may_change_at_resume_is_said_at_the_option() -> None:
    free = names_free_at_resume()
    assert {"min_samples_per_full_checkpoint", "output_dir", "logging_steps"} <= free
    assert not free & {"learning_rate", "seed", "batch_size", "max_steps", "optim", "osft", "train_on"}
