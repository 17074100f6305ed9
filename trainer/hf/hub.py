"""The hub: a repository for a run's exports, with a model card that says what was trained and how.

Knows a run by its options, its state and its model. Only the main rank talks to the hub; a failure is an error
on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard
from transformers.modelcard import TrainingSummary, parse_log_history

from trainer.atomic import LISTING, write_page
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import as_list
from trainer.distributed.group import Given, Group
from trainer.errors import OutputError

if TYPE_CHECKING:
    from trainer.hf.trainer import Trainer

CARD = "README.md"
ON_CARD = {  # options, under the names that transformers' cards give them
    "learning_rate": "learning_rate",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "seed": "seed",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "optimizer": "optim",
    "lr_scheduler_type": "lr_scheduler_type",
    "lr_scheduler_warmup_steps": "warmup_steps",
    "num_epochs": "num_train_epochs",
}


def init_hf_repo(trainer: Trainer, token: str | None = None, private: bool | None = None) -> None:
    """Make the repository that the options name, where it is not there yet.

    Raises:
        OutputError: the hub refuses, or cannot be reached.
    """
    trainer.hub_model_id = create_repository(trainer.args, trainer.group, token, private)


def push_to_hub(
    trainer: Trainer,
    commit_message: str = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> Any:
    """Export the model and push it with a model card; `card` are facts for it, see `create_model_card`.

    Returns:
        What the hub says of the commit, or a future of that where `blocking` is false; None on other ranks.

    Raises:
        OutputError: the hub refuses, or cannot be reached.
    """
    trainer.events.emit("on_push_begin")
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token, private)
    folder = trainer.save_model(trainer.export_folder(), _internal_call=True)
    tags = [*as_list(card.get("tags")), *as_list(getattr(trainer.model, "model_tags", None))]
    _write_run_card(trainer, folder, {**card, "tags": tags})
    settings = {"commit_message": commit_message, "run_as_future": not blocking, "repo_id": trainer.hub_model_id}
    return upload(trainer.args, trainer.group, folder, token=token, revision=revision, **settings)


def create_model_card(trainer: Trainer, language: str | None = None, license: str | None = None, **facts: Any) -> None:
    """Write a model card into output_dir: what was trained, how, and with what result.

    `facts` are model_name, tags, finetuned_from, tasks, dataset, dataset_tags, dataset_args, dataset_metadata.
    """
    _write_run_card(trainer, Path(trainer.args.output_dir), {"language": language, "license": license, **facts})


def _write_run_card(trainer: Trainer, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write a model card of a run into a folder, on the main rank."""
    source = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
    known = {"finetuned_from": source} if source and not Path(source).is_dir() else {}
    if trainer.group.is_main:
        write_card(folder / CARD, trainer.args, trainer.state.log_history, **{**known, **facts})


def repository_name(args: TrainingArguments) -> str:
    """Return the name that the options give a repository: that of the output folder where they give none."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def create_repository(args: TrainingArguments, group: Group, token: str | None, private: bool | None) -> str | None:
    """Make the run's repository, or find it; return its whole name, on the main rank.

    Raises:
        OutputError: the hub refuses, or cannot be reached.
    """
    name = repository_name(args)
    private = args.hub_private_repo if private is None else private

    def create() -> str:
        found = HfApi().create_repo(name, token=token or args.hub_token, private=private, exist_ok=True)
        return str(found.repo_id)

    return on_lead(group, create, f"{name} could not be made on the hub")


def upload(args: TrainingArguments, group: Group, folder: Path, **settings: Any) -> Any:
    """Push what lies in a folder; `settings` are those of huggingface_hub's upload_folder.

    Raises:
        OutputError: the hub refuses, or cannot be reached.
    """
    settings = {"token": args.hub_token, "revision": args.hub_revision} | {
        name: value for name, value in settings.items() if value is not None
    }
    what = f"{folder} could not be pushed to {repository_name(args)}"
    return on_lead(
        group, lambda: HfApi().upload_folder(folder_path=folder, ignore_patterns=[LISTING], **settings), what
    )


def on_lead(group: Group, do: Callable[[], Given], what: str) -> Given | None:
    """Return what `do` returns on the main rank; None on the others.

    Raises:
        OutputError: on all ranks, where it failed.
    """
    with group.naming_faults(lambda: what):
        done, error = group.try_on_main(do, Exception)  # its transport, and so what it raises, changes with the version
        said = group.first_error(error)
    if said is not None:
        raise OutputError(f"{what}: {said}; log in with `hf auth login`, or give hub_token") from error
    return done


def write_card(path: Path, args: TrainingArguments, history: list[dict[str, float]], **facts: Any) -> None:
    """Write what was trained and how; tags of a card that is there already stay, one that is not ours is set aside.

    Args:
        path: the file.
        args, history: options, and the run's log.
        facts: what TrainingSummary takes: model_name, finetuned_from, tags, license, dataset ...
    """
    former = ModelCard.load(path).data.tags or [] if path.is_file() else []
    tags = list(dict.fromkeys(["generated_from_trainer", *as_list(facts.pop("tags", None)), *former]))
    _, lines, results = parse_log_history(history)
    options = args.to_dict()  # with enumerations of transformers where a script gave them
    summary = TrainingSummary(
        model_name=facts.pop("model_name", None) or repository_name(args).rpartition("/")[2],
        tags=tags,
        eval_lines=lines,
        eval_results=results,
        hyperparameters={word: getattr(value := options[name], "value", value) for word, name in ON_CARD.items()},
        **facts,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, summary.to_model_card())
