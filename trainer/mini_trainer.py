"""The flags of mini_trainer 0.9's command line, read as our options, for scripts that start `-m trainer.train`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.cli.check import check_before_start
from trainer.cli.parse import parse_alone, said_once
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option, parse_json
from trainer.errors import MissingPackageError, UsageError


@dataclass
class MiniTrainerFlags:
    """Train one run, with the flags and defaults of mini_trainer's command line."""

    model_name_or_path: str
    data_path: str
    batch_size: int
    max_tokens_per_gpu: int
    learning_rate: float
    output_dir: str
    num_warmup_steps: int = 0
    lr_scheduler: str = "constant_with_warmup"
    lr_scheduler_kwargs: str = option("{}", "Settings of the schedule, as JSON.")
    seed: int = 67
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    use_liger_kernels: bool = False
    osft: bool = option(False, "Orthogonal subspace fine-tuning; all outside the split matrices trains, as there.")
    osft_unfreeze_rank_ratio: float | None = option(None, "Share of each matrix's singular directions that trains.")
    osft_target_patterns: str | None = option(None, "Parts of names of the matrices to split, separated by commas.")
    osft_upcast_dtype: Literal["float32", "float64"] = option("float32", "Format of the decompositions.")
    osft_output_dtype: Literal["float32"] | None = option(None, "Format of the factors; float32 always.")
    min_samples_per_checkpoint: int | None = None
    training_mode: Literal["epoch", "step", "token", "infinite"] = "epoch"
    max_epochs: int = option(1, "Epochs, in mode epoch.")
    max_steps: int = option(0, "Steps, in mode step.")
    max_tokens: int = option(0, "Loss tokens, in mode token.")
    checkpoint_at_epoch: bool = False
    save_final_checkpoint: bool = False
    on_demand_checkpointing: bool = option(
        False, "Save the full state on SIGTERM, SIGUSR1, Ctrl-C and their like, and go on from it when started again."
    )
    resume_from_full_state_checkpoint: str | None = option(None, "A checkpoint to go on from, or auto.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    train_dtype: Literal["float32", "bfloat16"] = option("float32", "Compute type; master weights are float32.")
    validation_split: float = 0.0
    validation_data_path: str | None = None
    validation_frequency: int | None = option(None, "Steps between validations.")
    validate_at_epoch: bool = False
    min_samples_per_validation: int | None = None
    validate_at_final: bool = False
    save_best_val_loss: bool = False
    trust_remote_code: bool = False
    block_size: int | None = None
    val_loss_improvement_threshold: float = 0.0
    wandb_project: str | None = None
    wandb_run_name: str | None = None
    wandb_entity: str | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_experiment_name: str | None = None
    mlflow_run_name: str | None = None
    overlong: Literal["error", "drop", "truncate", "split"] = option("error", "What to do with longer samples.")
    on_untrainable: Literal["error", "drop"] = option("error", "What to do with samples without a trained token.")
    overwrite_output_dir: bool = option(False, "Start afresh in a folder that already holds a run.")
    allow_change: list[str] = option([], "Options that may differ from those of the run that is resumed.")

    def to_arguments(self) -> TrainingArguments:
        """Say the same in our options."""
        reporting = {"report_to": self.trackers or "none", "run_name": self.mlflow_run_name or self.wandb_run_name}
        given = self._renamed() | self._length() | self._validation() | self._osft() | reporting
        return TrainingArguments(**given)

    def _renamed(self) -> dict[str, Any]:
        same: tuple[str, ...] = (
            "model_name_or_path",
            "data_path",
            "batch_size",
            "max_tokens_per_gpu",
            "learning_rate",
            "output_dir",
        )
        same += ("seed", "weight_decay", "use_liger_kernels", "min_samples_per_checkpoint", "save_dtype")
        same += ("validation_split", "validation_data_path", "trust_remote_code", "block_size")
        same += ("overlong", "on_untrainable", "overwrite_output_dir", "allow_change")
        newest = "auto" if self.on_demand_checkpointing else None
        return {name: getattr(self, name) for name in same} | {
            "warmup_steps": self.num_warmup_steps,
            "lr_scheduler_type": self.lr_scheduler,
            "lr_scheduler_kwargs": parse_json(self.lr_scheduler_kwargs),
            "adam_beta1": self.beta1,
            "adam_beta2": self.beta2,
            "adam_epsilon": self.eps,
            "bf16": self.train_dtype == "bfloat16",
            "save_strategy": "signal" if self.on_demand_checkpointing else "no",
            "resume_from_checkpoint": self.resume_from_full_state_checkpoint or newest,
            "export_at_epoch": self.checkpoint_at_epoch,
            "export_final": self.save_final_checkpoint,
            "export_best": self.save_best_val_loss,
        }

    def _length(self) -> dict[str, Any]:
        limit = {"step": "max_steps", "token": "max_tokens", "epoch": "max_epochs"}.get(self.training_mode)
        if limit is not None and getattr(self, limit) <= 0:
            raise UsageError(f"training_mode={self.training_mode} needs {limit}, a positive number")
        modes: dict[str, dict[str, Any]] = {
            "epoch": {"num_train_epochs": float(self.max_epochs)},
            "step": {"max_steps": self.max_steps},
            "token": {"max_tokens": self.max_tokens},
            "infinite": {"num_train_epochs": float("inf")},
        }
        return modes[self.training_mode]

    def _validation(self) -> dict[str, Any]:
        if self.validation_frequency is not None and self.validate_at_epoch:
            raise UsageError("validation_frequency and validate_at_epoch exclude each other: give one")
        by_steps = self.validation_frequency is not None
        return {
            "eval_strategy": "steps" if by_steps else "epoch" if self.validate_at_epoch else "no",
            "eval_steps": self.validation_frequency,
            "min_samples_per_evaluation": self.min_samples_per_validation,
            "eval_at_end": self.validate_at_final,
            "metric_improvement_threshold": self.val_loss_improvement_threshold,
        }

    def _osft(self) -> dict[str, Any]:
        if not self.osft:
            return {"osft_unfreeze_rank_ratio": self.osft_unfreeze_rank_ratio}
        names = (self.osft_target_patterns or "").replace("'", "").replace('"', "").replace(" ", "").split(",")
        return {
            "osft": True,
            "osft_unfreeze_rank_ratio": self.osft_unfreeze_rank_ratio,
            "osft_target_patterns": [re.escape(name.removesuffix(".weight")) for name in names if name],
            "osft_train_patterns": ["."],
            "osft_svd_dtype": self.osft_upcast_dtype,
        }

    @property
    def trackers(self) -> list[str]:
        """Trackers of which some flag is given."""
        wandb = (self.wandb_project, self.wandb_run_name, self.wandb_entity)
        mlflow = (self.mlflow_tracking_uri, self.mlflow_experiment_name, self.mlflow_run_name)
        return ["wandb"] * any(wandb) + ["mlflow"] * any(mlflow)


def run(words: Sequence[str]) -> int:
    """Parse mini_trainer's flags and train; return the exit code."""
    from trainer.cli.train import train

    with said_once():
        flags = parse_alone("trainer.train", words, MiniTrainerFlags)
        args = flags.to_arguments()
        check_before_start(args)
    open_trackers(flags)
    return train(args)


def open_trackers(flags: MiniTrainerFlags) -> None:
    """Set up the trackers on the main rank as their flags say; transformers' callbacks use the run that is open.

    Raises:
        MissingPackageError: a tracker is not installed.
    """
    from trainer.distributed.topology import current_topology

    if not current_topology().is_main:
        return
    for name in flags.trackers:
        try:
            tracker = importlib.import_module(name)
        except ImportError as error:
            raise MissingPackageError.in_extra(f"--{name}_...: {error}", name) from error
        if name == "wandb":
            tracker.init(project=flags.wandb_project, entity=flags.wandb_entity, name=flags.wandb_run_name)
            continue
        if flags.mlflow_tracking_uri is not None:
            tracker.set_tracking_uri(flags.mlflow_tracking_uri)
        if flags.mlflow_experiment_name is not None:
            tracker.set_experiment(flags.mlflow_experiment_name)
