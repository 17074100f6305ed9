"""`trainer train`: one run, on this process or on several that it starts itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.cli.check import check_before_start
from trainer.cli.parse import parse, said_once
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.config.groups import GROUPS
from trainer.config.rules import COMMAND_RULES
from trainer.distributed.topology import Topology, current_topology

logger = logging.getLogger(__name__)


@dataclass
class LaunchArguments:
    """Processes on this machine."""

    nproc_per_node: int | Literal["auto"] = option(
        1, "Processes to train on; more than 1 starts torchrun. auto: one for each GPU.", above=0
    )
    profile: int | None = option(
        None, "Profile so many steps, from the third on: a trace for Perfetto, and the ten dearest operations.", above=0
    )


def run(words: Sequence[str]) -> int:
    """Parse, launch if asked, train; return the exit code."""
    with said_once():
        args, launch = parse(
            "train", words, GROUPS, LaunchArguments, "Prepare the data, train, evaluate, save.", COMMAND_RULES
        )
        check_before_start(args)
    if launch.nproc_per_node != 1 and Topology.from_environment().world_size == 1:
        from trainer.distributed.launch import number_of_ranks, run_on_ranks

        num_ranks = number_of_ranks(launch.nproc_per_node, use_cpu=args.use_cpu)
        if num_ranks > 1:
            return run_on_ranks(num_ranks, "trainer", ["train", *words])
    return train(args, launch.profile)


def train(args: TrainingArguments, num_profiled: int | None = None) -> int:
    """Train in this process, with progress; return the exit code."""
    logger.info("importing torch and transformers")
    from transformers.trainer_callback import TrainerCallback
    from transformers.utils.logging import disable_progress_bar

    from trainer.cli.memory import foretell_memory
    from trainer.cli.progress import ProfileSteps, ProgressDisplay, show_answers, show_summary
    from trainer.cli.stores import PreparationDisplay
    from trainer.distributed.group import Group, memory_of_rank
    from trainer.model.tokenizer import load_tokenizer
    from trainer.training.agreement import agree, option_facts, version_facts
    from trainer.training.task import check_names, load_datasets
    from trainer.training.trainer import CoreTrainer

    check_names(args)
    disable_progress_bar()  # ours says what happens
    tokenizer = load_tokenizer(args)
    topology = current_topology()
    if topology.is_main:
        foretell_memory(args, topology.world_size, memory_of_rank(args, topology))
    with Group.join(args) as group:
        with group.naming_faults(lambda: "before the first step"):
            agree(group, lambda: version_facts() | option_facts(args))  # preparing data may take hours
        with PreparationDisplay() as progress:
            train_dataset, eval_dataset = load_datasets(args, tokenizer, group, progress)
        logger.info("building the model and reading its weights")
        callbacks: list[TrainerCallback] = [ProgressDisplay()]
        if num_profiled is not None:
            callbacks.append(ProfileSteps(num_profiled))
        trainer = CoreTrainer(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
        if group.is_main:
            show_answers(trainer.answers, args.num_generation_samples)
            show_summary(trainer)
    return 128 + trainer.stop_signal if trainer.stop_signal else 0
