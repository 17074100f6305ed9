"""`trainer evaluate`: loss, perplexity and scores of a run, a checkpoint or any model, on any data.

What is not given is taken from the run that a model comes from, so that the numbers are those that the run logged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.cli.check import check_data, check_place
from trainer.cli.parse import parse_alone, positional
from trainer.config.fields import option
from trainer.errors import ModelError, UsageError

if TYPE_CHECKING:
    from trainer.config.arguments import TrainingArguments
    from trainer.data.store import TokenStore
    from trainer.distributed.group import Group

FROM_RUN = (  # options that decide the numbers, taken from the run where they are not given
    *("train_on", "chat_template", "max_length", "max_tokens_per_rank", "batch_size", "packing_cost", "seed"),
    *("label_smoothing_factor", "generation_max_new_tokens", "data_cache_dir"),
)


@dataclass
class EvaluateOptions:
    """Measure the loss, perplexity and scores of a run, a checkpoint or any model, on any data."""

    model: str = positional("A run, a checkpoint, a Hugging Face folder or a hub name.")
    data_path: str | None = option(None, "The held-out data; by default that of the run.")
    train_on: Literal["assistant", "all", "last"] | None = option(
        None, "Which turns count; by default as in the run, or the assistant's. With 'all' losses are told by role."
    )
    chat_template: str | None = option(None, "A Jinja file instead of the tokenizer's chat template.")
    max_tokens_per_rank: int | None = option(None, "Token budget of a micro-batch.", above=0)
    batch_size: int | None = option(None, "Samples of a batch over all ranks.", above=0)
    eval_exact_match: bool = option(False, "Answer chats greedily and count exact answers.")
    score_answers: list[str] = option([], "Scores of generated answers: as the option of the same name of train.")
    generation_max_new_tokens: int | None = option(None, "Longest generated answer, in tokens.", above=0)
    bf16: bool | None = option(None, "Compute in bfloat16.")
    use_cpu: bool = option(False, "Stay on the CPU although a GPU is there.")
    trust_remote_code: bool = option(False, "Run code that comes with a model of the hub.")
    json: bool = option(False, "Print one JSON object.")


def run(words: Sequence[str]) -> int:
    """Load, measure, print; return the exit code."""
    options = parse_alone("trainer evaluate", words, EvaluateOptions)
    check_place("model", options.model)
    if options.data_path is not None:
        check_data("data_path", options.data_path)

    from trainer.config.arguments import TrainingArguments
    from trainer.config.groups import MachineArguments
    from trainer.distributed.group import Group
    from trainer.optim.adapters import averaged_weights
    from trainer.training.evaluate import evaluation_loss, split_by_role
    from trainer.training.packed_task import PackedTask
    from trainer.training.saved_model import open_saved_model

    with (
        Group.join(MachineArguments(use_cpu=options.use_cpu)) as group,
        group.naming_faults(lambda: "evaluation"),
    ):
        saved = open_saved_model(
            options.model,
            group.device,
            is_packed=True,
            is_bf16=bool(options.bf16),
            trust_remote_code=options.trust_remote_code,
        )
        if saved.tokenizer is None:
            raise ModelError(f"{saved.place} has no tokenizer: it is needed to read the data")
        run_args = saved.options
        known = {} if run_args is None else run_args.as_given()
        chosen = {name: known[name] for name in FROM_RUN if name in known}
        for name in FROM_RUN:
            given = getattr(options, name, None)
            if given is not None:
                chosen[name] = given
        args = TrainingArguments(
            **chosen,
            eval_exact_match=options.eval_exact_match,
            score_answers=options.score_answers,
            use_cpu=options.use_cpu,
            eval_on_start=True,
        )
        data_args = args
        if options.data_path is None:
            if run_args is None or not (run_args.validation_split or run_args.validation_data_path):
                raise UsageError(f"--data-path is missing: {saved.place} is of no run with held-out data")
            data_args = run_args
            if options.train_on is not None:
                data_args = TrainingArguments(**{**run_args.as_given(), "train_on": options.train_on})
        store = _held_out(options.data_path, data_args, saved.tokenizer, group)
        task = PackedTask(args, group, None, saved.tokenizer, store, store, prepared=saved.prepared)
        with averaged_weights(saved.optimizer):
            metrics, _ = task.evaluate(store, task.eval_loader(store), 0, "eval", None)
            if data_args.train_on == "all" and store.metadata.get("kind") == "messages":
                of_assistant = {"train_on": "assistant", "on_untrainable": "drop"}
                data_args = TrainingArguments(**{**data_args.as_given(), **of_assistant})
                by_role = split_by_role(store, _held_out(options.data_path, data_args, saved.tokenizer, group))
                for role, part in by_role.items():
                    found = evaluation_loss(saved.prepared, task.eval_loader(part), group, args.label_smoothing_factor)
                    metrics[f"eval_loss/{role}"] = found["loss"]
        metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700))  # e^710 overflows
        if group.is_main:
            if options.json:
                print(json.dumps({"model": saved.place, **metrics}))
            else:
                for name, value in metrics.items():
                    print(f"{name:<24}{value:.6g}")
    return 0


def _held_out(data_path: str | None, args: TrainingArguments, tokenizer: Any, group: Group) -> TokenStore:
    """Prepare the data that is named, or else the held-out data of a run with these options."""
    from trainer.data.prepare import prepare
    from trainer.training.task import load_datasets

    if data_path is None:
        _, held_out = load_datasets(args, tokenizer, group)
        assert held_out is not None
        return held_out
    with group.main_first():
        return prepare(data_path, tokenizer, args, args.longest_sample)
