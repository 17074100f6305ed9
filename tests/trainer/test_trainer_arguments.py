"""TrainingArguments in scripts for transformers: read, parsed from words, changed by subject, asked for ranks."""

from __future__ import annotations

import dataclasses
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode
from transformers.utils import logging as transformers_logging

from tests.fixtures.datasets import RegressionDataset
from tests.fixtures.regression import RegressionModel
from trainer import Trainer
from trainer.config.arguments import Seq2SeqTrainingArguments, TrainingArguments
from trainer.config.foreign_names import WITH_VALUE
from trainer.errors import PeerError, UsageError


class TestReading:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"output_dir": None}, {"output_dir": "outputs"}),
            ({"output_dir": Path("a")}, {"output_dir": "a"}),
            ({"output_dir": "~/a"}, {"output_dir": str(Path("~/a").expanduser())}),
            ({"report_to": None}, {"report_to": []}),
            ({"report_to": "none"}, {"report_to": []}),
            ({"report_to": "tensorboard"}, {"report_to": ["tensorboard"]}),
            ({"eval_strategy": "steps", "logging_steps": 7}, {"eval_steps": 7, "do_eval": True}),
            ({"eval_strategy": "epoch"}, {"eval_steps": None, "do_eval": True}),
            ({}, {"eval_steps": None, "do_eval": False, "greater_is_better": False, "torch_compile": False}),
            ({"eval_strategy": "epoch", "metric_for_best_model": "wer"}, {"greater_is_better": True}),
            (
                {"eval_strategy": "epoch", "metric_for_best_model": "wer", "greater_is_better": False},
                {"greater_is_better": False},
            ),
            ({"torch_compile": True}, {"torch_compile_backend": "inductor"}),
            ({"torch_compile_mode": "default"}, {"torch_compile": True, "torch_compile_backend": "inductor"}),
            ({"torch_compile_backend": "eager"}, {"torch_compile": True, "torch_compile_backend": "eager"}),
            ({"lr_scheduler_kwargs": '{"power": 2}'}, {"lr_scheduler_kwargs": {"power": 2}}),
            ({"debug": None}, {"debug": ""}),
            ({"gradient_checkpointing": None}, {"gradient_checkpointing": False}),
            ({"gradient_checkpointing_kwargs": None}, {"gradient_checkpointing_kwargs": {}}),
            ({"activation_checkpointing": None}, {"gradient_checkpointing": False}),
            ({"lr_scheduler_kwargs": None}, {"lr_scheduler_kwargs": {}}),
            ({"metric_for_best_model": None}, {"metric_for_best_model": "loss"}),
            ({"disable_tqdm": None}, {"disable_tqdm": False}),
            ({"eval_strategy": IntervalStrategy.EPOCH}, {"eval_strategy": "epoch"}),
            ({"lr_scheduler_type": SchedulerType.COSINE}, {"lr_scheduler_type": "cosine"}),
            ({"optim": OptimizerNames.ADAFACTOR}, {"optim": "adafactor"}),
        ],
        ids=str,
    )
    def test_options_read_as_in_transformers(self, given: dict[str, Any], expected: dict[str, Any]) -> None:
        args = TrainingArguments(**given)
        assert {name: getattr(args, name) for name in expected} == expected

    def test_enums_of_transformers_have_a_value(self) -> None:
        for args in (TrainingArguments(), TrainingArguments(**TrainingArguments().to_dict())):
            read = {name: getattr(args, name).value for name in WITH_VALUE}
            assert read == {
                "eval_strategy": "no",
                "save_strategy": "steps",
                "logging_strategy": "steps",
                "lr_scheduler_type": "linear",
                "optim": "adamw_torch_fused",
                "hub_strategy": "every_save",
            }
        args.eval_strategy = "epoch"
        assert (args.eval_strategy.value, f"{args.eval_strategy}", args.to_dict()["eval_strategy"]) == ("epoch",) * 3

    def test_options_of_scripts_may_be_dtypes(self) -> None:
        own = dataclasses.make_dataclass("Own", [("dtype", Any, torch.float16)], bases=(TrainingArguments,))
        assert own().to_dict()["dtype"] == "float16"

    def test_what_was_derived_is_derived_anew(self) -> None:
        args = TrainingArguments(eval_strategy="steps", torch_compile=True)
        assert TrainingArguments(**args.as_given() | {"logging_steps": 3}).eval_steps == 3
        off = TrainingArguments(**args.as_given() | {"eval_strategy": "no", "torch_compile": False})
        assert (off.eval_steps, off.do_eval, off.torch_compile_backend) == (None, False, None)

    @pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
    def test_words_are_parsed_by_transformers_parser(self, kind: Any) -> None:
        words = "--output_dir out --do_train --learning_rate 1e-4 --optim_target_modules all-linear --warmup_steps 0.1"
        words += " --include_for_metrics inputs loss"
        (args,) = HfArgumentParser(kind).parse_args_into_dataclasses([*words.split(), "--report_to", "tensorboard"])
        assert args == kind(
            "out",
            include_for_metrics=["inputs", "loss"],
            do_train=True,
            learning_rate=1e-4,
            optim_target_modules="all-linear",
            warmup_steps=0.1,
            report_to=["tensorboard"],
        )


SCRIPTS = {  # options that scripts declare beside TrainingArguments
    "language modelling": ""
    "model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer "
    "model_revision token trust_remote_code dtype dataset_name dataset_config_name train_file validation_file "
    "max_train_samples max_eval_samples streaming block_size overwrite_cache validation_split_percentage "
    "preprocessing_num_workers keep_linebreaks max_seq_length mlm_probability line_by_line pad_to_max_length",
    "classification": ""
    "task_name max_seq_length overwrite_cache pad_to_max_length max_predict_samples train_file test_file "
    "ignore_mismatched_sizes do_regression text_column_names label_column_name shuffle_train_dataset "
    "metric_name return_entity_level_metrics label_all_tokens doc_stride n_best_size max_answer_length "
    "version_2_with_negative",
    "sequence to sequence": "source_lang target_lang text_column summary_column max_source_length max_target_length "
    "val_max_target_length num_beams ignore_pad_token_for_loss source_prefix forced_bos_token "
    "resize_position_embeddings",
    "chats": "model_name_or_path data_path eval_data_path lazy_preprocess padding_side model_max_length "
    "attn_implementation chat_template max_length dataset_num_proc trust_remote_code validation_split train_on",
    "adapters": "dataset_name dataset_config dataset_train_split dataset_test_split use_peft lora_r lora_alpha "
    "lora_dropout lora_target_modules lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit "
    "load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant model_revision attn_implementation packing "
    "eval_packing",
}


class TestArgumentParser:
    """transformers' HfArgumentParser, as its example scripts use it."""

    @pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_options_of_scripts_do_not_conflict_with_ours(self, kind: Any, script: str) -> None:
        names = SCRIPTS[script].split()
        own = dataclasses.make_dataclass("ScriptOptions", [(name, str, "unset") for name in names])
        words = [word for name in names for word in (f"--{name}", "given")]
        for kinds in ((own, kind), (kind, own)):
            parsed = HfArgumentParser(kinds).parse_args_into_dataclasses([*words, "--output_dir=out", "--bf16", "True"])
            args, options = sorted(parsed, key=lambda one: isinstance(one, own))
            assert set(vars(options).values()) == {"given"}
            assert args == kind("out", bf16=True)

    def test_options_of_ours_are_parsed_for_token_data(self) -> None:
        words = [
            "--output_dir=out",
            "--batch_size=4",
            "--max_tokens_per_rank=77",
            "--osft",
            "--osft_unfreeze_rank_ratio=0.2",
        ]
        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
        assert args == TrainingArguments(
            "out", batch_size=4, max_tokens_per_rank=77, osft=True, osft_unfreeze_rank_ratio=0.2
        )

    def test_names_that_are_not_here_get_advice_or_may_have_their_default(self) -> None:
        @dataclasses.dataclass
        class Own(TrainingArguments):
            max_length: int = 512
            use_cache: bool = True

        for kind in (TrainingArguments, Seq2SeqTrainingArguments, Own):
            parser = HfArgumentParser(kind)
            granted = ["--ddp_find_unused_parameters", "False", "--fsdp", "", "--log_on_each_node", "true"]
            (args,) = parser.parse_args_into_dataclasses(["--output_dir=out", *granted, "--hub_strategy=end"])
            assert (args, args.hub_strategy) == (kind("out"), "end")
            with pytest.raises(UsageError, match="deepspeed: this option of transformers is not supported; weights"):
                parser.parse_args_into_dataclasses(["--deepspeed", "ds.json"])
        (own,) = parser.parse_args_into_dataclasses(["--max_length=7", "--use_cache=False"])
        assert (own.max_length, own.use_cache, own.block_size) == (7, False, None)
        assert (
            dataclasses.replace(own, block_size=5).to_dict()
            == Own(max_length=7, use_cache=False, block_size=5).to_dict()
        )


class TestSetters:
    def test_options_change_by_subject(self) -> None:
        args = TrainingArguments(weight_decay=0.1)
        assert args.set_training(1e-3, batch_size=4, num_epochs=2) is args
        args.set_evaluate("steps", batch_size=2).set_testing(3).set_save(strategy="steps", steps=7)
        args.set_logging(strategy="steps", steps=5, report_to="none").set_dataloader(sampler_seed=1, num_workers=2)
        args.set_optimizer("adamw_torch", beta1=0.8).set_lr_scheduler("cosine", warmup_steps=0.05)
        assert args == TrainingArguments(
            do_train=True,
            do_predict=True,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,
            num_train_epochs=2,
            weight_decay=0.1,
            eval_strategy="steps",
            save_steps=7,
            logging_steps=5,
            data_seed=1,
            dataloader_num_workers=2,
            optim="adamw_torch",
            adam_beta1=0.8,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
        )

    def test_what_contradicts_changes_nothing(self) -> None:
        args = TrainingArguments()
        with pytest.raises(UsageError, match="learning_rate = -1: must be at least"):
            args.set_training(-1, batch_size=3)
        with pytest.raises(UsageError, match="options of the optimizer are name, .*: found lr"):
            args.set_optimizer(lr=1)
        with pytest.raises(UsageError, match=r"options of training: give them by name \(learning_rate"):
            args.set_training(1e-3, 8)
        assert args == TrainingArguments()


class TestProcess:
    @pytest.mark.world_size(1, 2)
    def test_arguments_know_their_process(self, ranks) -> None:
        args = TrainingArguments(use_cpu=True)
        assert (args.world_size, args.process_index, args.local_process_index) == (
            ranks.world_size,
            ranks.rank,
            ranks.rank,
        )
        assert args.should_log == args.should_save == ranks.is_main
        assert (args.device.type, args.n_gpu, args.place_model_on_device) == ("cpu", 0, True)
        assert args.parallel_mode == (ParallelMode.DISTRIBUTED if ranks.world_size > 1 else ParallelMode.NOT_PARALLEL)
        assert args.ddp_timeout_delta == timedelta(seconds=1800)
        before = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity(logging.DEBUG)
        try:
            assert args.get_process_log_level() == (logging.DEBUG if ranks.is_main else logging.WARNING)
        finally:
            transformers_logging.set_verbosity(before)

    def test_trackers_get_every_option_as_a_plain_value(self) -> None:
        schedule: dict[str, Any] = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}}
        args = TrainingArguments(learning_rate=0.5, **schedule)
        shown = args.to_sanitized_dict()
        assert shown.keys() == args.to_dict().keys()
        assert (shown["learning_rate"], shown["lr_scheduler_kwargs"], shown["bf16"]) == (0.5, "{'min_lr': 0.1}", False)

    @pytest.mark.world_size(1, 2, 3)
    @pytest.mark.parametrize("local", [True, False])
    def test_the_main_process_goes_first(self, ranks, local: bool) -> None:
        done = ranks.tmp_path / "done"
        with TrainingArguments(use_cpu=True).main_process_first(local=local, desc="preparing"):
            assert done.exists() != ranks.is_main
            done.touch()

    @pytest.mark.world_size(2)
    def test_others_stop_where_the_first_fails(self, ranks) -> None:
        error = (ValueError, "bad data") if ranks.is_main else (PeerError, "preparing stopped because the first rank")
        with (
            pytest.raises(error[0], match=error[1]),
            TrainingArguments(use_cpu=True).main_process_first(desc="preparing"),
        ):
            raise ValueError("bad data")


def test_options_assigned_after_construction_are_checked_when_they_are_used(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = Trainer(RegressionModel(), args, train_dataset=RegressionDataset())
    args.eval_steps = 5
    for use in (trainer.train, lambda: Trainer(RegressionModel(), args, train_dataset=RegressionDataset())):
        with pytest.raises(UsageError, match="eval_steps has no effect with eval_strategy=no"):
            use()
