"""L6: the same configuration, data and seed give the same run, bit for bit, from Python and from the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.models import tiny_llama
from tests.fixtures.runs import as_words, build_trainer, chat_job, random_token_samples, read_metrics, weights_of
from tests.fixtures.tokenizers import build_tokenizer
from trainer.cli.main import main
from trainer.config.arguments import TrainingArguments
from trainer.data.prepare import prepare
from trainer.hf.trainer import Trainer
from trainer.model.build import load_model

SAMPLES = random_token_samples((9, 3, 17, 5, 30, 2, 11, 7))


def run(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    trainer = build_trainer(folder, SAMPLES, tiny_llama(attention_dropout=0.1), num_train_epochs=2, **options)
    trainer.train()
    return weights_of(trainer.model)


@pytest.mark.world_size(1, 2)
def test_the_same_run_twice_is_the_same_bit_for_bit(ranks, tmp_path: Path) -> None:
    first, second = ranks.tmp_path / "first", ranks.tmp_path / "second"
    weights, weights_again = run(first), run(second)
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    ranks.barrier()  # the main rank has written its last line
    assert read_metrics(first) == read_metrics(second)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    run(tmp_path / "first")
    run(tmp_path / "second", seed=7)
    assert read_metrics(tmp_path / "first") != read_metrics(tmp_path / "second")


def test_the_mode_in_which_a_model_arrives_does_not_matter(tmp_path: Path) -> None:
    weights = []
    for is_training in (True, False):  # with dropout: a model in evaluation mode would have none
        model = tiny_llama(attention_dropout=0.1).train(is_training)
        trainer = build_trainer(tmp_path / str(is_training), SAMPLES, model, max_steps=2)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf_format" / "samples_16" / "model.safetensors")


def test_the_command_line_and_python_do_the_same_run(tmp_path: Path) -> None:
    job = {**chat_job(tmp_path), "learning_rate": 1e-2, "max_steps": 4}
    assert main(["train", *as_words(job), f"--output-dir={tmp_path / 'typed'}"]) == 0

    args = TrainingArguments(**job, output_dir=str(tmp_path / "called"))
    tokenizer = build_tokenizer()
    Trainer(
        model=load_model(args, tokenizer, seed=args.seed).model,
        args=args,
        train_dataset=prepare(job["data_path"], tokenizer, args, limit=512),
        processing_class=tokenizer,
    ).train()

    typed, called = exported(tmp_path / "typed"), exported(tmp_path / "called")
    assert typed.keys() == called.keys()
    assert all(torch.equal(typed[name], called[name]) for name in typed)
    assert read_metrics(tmp_path / "typed") == read_metrics(tmp_path / "called")


def test_the_flags_of_mini_trainer_do_the_same_run() -> None:
    from trainer.mini_trainer import MiniTrainerFlags

    alike: dict[str, Any] = {
        "model_name_or_path": "model",
        "data_path": "data.jsonl",
        "batch_size": 4,
        "learning_rate": 1e-2,
        "output_dir": "out",
        "max_tokens": 1000,
    }
    flags = MiniTrainerFlags(
        **alike,
        max_tokens_per_gpu=512,
        training_mode="token",
        beta2=0.98,
        validation_split=0.1,
        validation_frequency=5,
        checkpoint_at_epoch=True,
        on_demand_checkpointing=True,
    )
    assert flags.to_arguments() == TrainingArguments(
        **alike,
        max_tokens_per_rank=512,
        lr_scheduler_type="constant_with_warmup",
        seed=67,
        adam_beta2=0.98,
        validation_split=0.1,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="signal",
        resume_from_checkpoint="auto",
        export_at_epoch=True,
        export_final=False,
    )
