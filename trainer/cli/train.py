"""`trainer train`: one run, on this process or on several that it starts itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.cli.parse import parse
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.config.groups import GROUPS
from trainer.errors import UsageError


@dataclass
class LaunchArguments:
    """Processes on this machine."""

    nproc_per_node: int = option(1, "Processes to train on; more than 1 starts torchrun.", above=0)


def run(words: Sequence[str]) -> int:
    """Parse, launch if asked, train; give the exit code."""
    args, launch = parse("train", words, GROUPS, LaunchArguments, "Prepare the data, train, evaluate, save.")
    if launch.nproc_per_node > 1 and not _is_under_torchrun():
        from trainer.distributed.launch import run_on_ranks

        return run_on_ranks(launch.nproc_per_node, "trainer", ["train", *words])
    return train(args)


def train(args: TrainingArguments) -> int:
    """Train in this process, with progress; give the exit code."""
    from transformers.utils import logging

    from trainer.cli.preparing import PreparationDisplay
    from trainer.cli.progress import ProgressDisplay, show_answers, show_summary
    from trainer.distributed.group import Group
    from trainer.model.tokenizer import load_tokenizer
    from trainer.training.build import check_names, load_datasets
    from trainer.training.trainer import CoreTrainer

    _check_held_out_data(args)
    check_names(args)
    logging.disable_progress_bar()  # ours says what happens
    tokenizer = load_tokenizer(args)
    with Group.join(args) as group:
        with PreparationDisplay() as progress:
            train_dataset, eval_dataset = load_datasets(args, tokenizer, group, progress)
        trainer = CoreTrainer(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[ProgressDisplay()],
        )
        trainer.train()
        if group.is_lead:
            show_answers(trainer.answers, args.num_generation_samples)
            show_summary(trainer)
    return 128 + trainer.stop_signal if trainer.stop_signal else 0


def _check_held_out_data(args: TrainingArguments) -> None:
    """Refuse what has no effect here: from Python one may still call `evaluate` or `generate`, a command does not."""
    has_data = bool(args.validation_split) or args.validation_data_path is not None
    when = "set eval_strategy, min_samples_per_evaluation, eval_on_start or eval_at_end"
    if args.eval_exact_match and not args.does_evaluate:
        raise UsageError(f"eval_exact_match has no effect without evaluations: {when}")
    if args.num_generation_samples and not has_data:
        raise UsageError("num_generation_samples needs held-out chats: give validation_split or validation_data_path")
    if has_data and not args.does_evaluate and not args.num_generation_samples:
        raise UsageError(f"validation_split and validation_data_path have no effect without evaluations: {when}")


def _is_under_torchrun() -> bool:
    from trainer.distributed.topology import Topology

    return Topology.from_environment().world_size > 1
