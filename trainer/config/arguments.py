"""TrainingArguments: every option of a run in one flat, validated, serialisable configuration.

Flat for users, narrow for code: it inherits the groups of `groups.py`, and each part of the trainer asks for its group.
Python, YAML and the command line all end here, so an option means the same everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from trainer.config.fields import as_list, as_meant, check_options, parse_json, plain, types_of
from trainer.config.foreign_names import ALIASES
from trainer.config.groups import (
    SCHEDULES_BY_METRIC,
    BatchArguments,
    CheckpointArguments,
    DataArguments,
    EvaluationArguments,
    ExportArguments,
    GenerationArguments,
    HubArguments,
    LoaderArguments,
    LoggingArguments,
    MachineArguments,
    ModelArguments,
    OptimizerArguments,
    OsftArguments,
    PredictionArguments,
    ScheduleArguments,
    ScriptArguments,
)
from trainer.config.suggest import check_foreign, foreign_value, unknown_option
from trainer.config.transformers_api import OptionSetters, ProcessWords
from trainer.errors import UsageError

NONE_IS_DEFAULT = (  # transformers says None where it means its default
    *("disable_tqdm", "gradient_checkpointing", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs"),
    "metric_for_best_model",
)
SECRET = "<secret>"  # instead of an option that nobody should read
IDENTITIES = ("data", "eval_data", "tokenizer", "callbacks")  # what else of a run may change when it is resumed


class _Options(type):
    """Makes constructors, of subclasses too, understand ALIASES and answer an unknown name with the nearest one."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **_known_options(cls, options))


def _known_options(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    known: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in names:
            if check_foreign(given, value):
                continue
            raise unknown_option(given, names)
        if name in known:
            alias = next(alias for alias, meant in ALIASES.items() if meant == name)
            raise UsageError(f"{alias} is another name of {name}: give one of them")
        is_json = isinstance(value, str) and names[name].startswith("dict[")
        known[name] = parse_json(value) if is_json else value
    return known


@dataclasses.dataclass
class TrainingArguments(  # the last base's options come first
    OptionSetters,
    ProcessWords,
    ScriptArguments,
    MachineArguments,
    HubArguments,
    LoggingArguments,
    PredictionArguments,
    CheckpointArguments,
    EvaluationArguments,
    ScheduleArguments,
    OptimizerArguments,
    LoaderArguments,
    BatchArguments,
    DataArguments,
    OsftArguments,
    ModelArguments,
    ExportArguments,
    metaclass=_Options,
):
    """Every option of a run.

    Raises:
        UsageError: an option is unknown, of the wrong type, out of range, or has no effect beside the others.
    """

    def __post_init__(self) -> None:
        self._normalise()
        check_options(self)
        unset = self._defaults()
        for name, value in self._derived().items():
            if getattr(self, name) == unset[name]:
                setattr(self, name, value)
        for is_wrong, message in (
            *self._contradictions(),
            *self._compute_contradictions(),
            *self._osft_contradictions(),
        ):
            if is_wrong:
                raise UsageError(message)

    def _normalise(self) -> None:
        """Write as the options have it what transformers takes in other forms too."""
        for field in dataclasses.fields(self):
            if field.name in NONE_IS_DEFAULT and getattr(self, field.name) is None:
                made = field.default_factory
                setattr(self, field.name, made() if callable(made) else field.default)
        if isinstance(self.include_num_input_tokens_seen, bool):
            self.include_num_input_tokens_seen = "all" if self.include_num_input_tokens_seen else "no"
        if isinstance(self.allow_change, list) and all(isinstance(name, str) for name in self.allow_change):
            self.allow_change = [name for names in self.allow_change for name in names.split(",")]
        if self.output_dir is None:
            self.output_dir = ExportArguments.output_dir
        if isinstance(self.output_dir, str | os.PathLike):
            self.output_dir = os.path.expanduser(self.output_dir)
        self.report_to = [] if self.report_to in (None, "none", ["none"]) else as_list(self.report_to)

    def _defaults(self) -> dict[str, Any]:
        """Give what each option is where it is not given."""
        return {field.name: field.default for field in dataclasses.fields(self)}

    def _derived(self) -> dict[str, Any]:
        """Give what options are that are not given, by others; scripts read them."""
        does_compile = self.torch_compile or (self.torch_compile_backend or self.torch_compile_mode) is not None
        return {
            "greater_is_better": not self.metric_for_best_model.endswith("loss"),  # going by its name
            "eval_steps": self.logging_steps if self.eval_strategy == "steps" else None,
            "do_eval": self.do_eval or self.eval_strategy != "no",
            "torch_compile": does_compile,
            "torch_compile_backend": "inductor" if does_compile else None,
        }

    def _contradictions(self) -> list[tuple[bool, str]]:
        return [
            *(
                (
                    interval >= 1 and interval != int(interval),
                    f"{name} = {interval}: expected a whole number, or a share of all steps below 1",
                )
                for name in ("logging_steps", "eval_steps", "save_steps")
                if (interval := getattr(self, name)) is not None
            ),
            *self._evaluation_contradictions(),
            (
                bool(self.model_name_or_path and self.model_config),
                "model_name_or_path (loads weights) and model_config (draws them) exclude each other: give one",
            ),
            (
                bool(self.validation_split and self.validation_data_path),
                "validation_split and validation_data_path exclude each other: give one",
            ),
            (
                self.data_path is not None and self.data_path == self.validation_data_path,
                f"data_path and validation_data_path are both {self.data_path!r}: held-out data must not be trained on",
            ),
            (
                self.max_length is not None and self.max_length > self.max_tokens_per_rank,
                f"max_length = {self.max_length} is more than max_tokens_per_rank = {self.max_tokens_per_rank}, which "
                "no sample may exceed: lower the one or raise the other",
            ),
            (
                self.warmup_steps > 0 and self.lr_scheduler_type in ("constant", *SCHEDULES_BY_METRIC),
                f"warmup_steps has no effect with lr_scheduler_type={self.lr_scheduler_type}: say constant_with_warmup",
            ),
            (
                self.lr_scheduler_type in SCHEDULES_BY_METRIC
                and self.eval_strategy == "no"
                and self.min_samples_per_evaluation is None,
                f"lr_scheduler_type={self.lr_scheduler_type} goes by metric_for_best_model: set eval_strategy or "
                "min_samples_per_evaluation",
            ),
            (
                self.logging_first_step and self.logging_strategy != "steps",
                f"logging_first_step has no effect with logging_strategy={self.logging_strategy}: say "
                "logging_strategy=steps",
            ),
            *self._checkpoint_contradictions(),
            (
                self._tells_trackio and not {"trackio", "all"} & set(self.report_to),
                "project, trackio_space_id, trackio_bucket_id, and trackio_static_space_id have no effect without "
                "report_to=trackio; other trackers read their own environment variables",
            ),
            (self.max_steps == 0, "max_steps = 0 would train nothing: give a positive number, or -1 for no limit"),
        ]

    def _evaluation_contradictions(self) -> list[tuple[bool, str]]:
        return [
            (
                not {"inputs", "loss"}.issuperset(self.include_for_metrics),
                f"include_for_metrics = {self.include_for_metrics}: allowed are inputs and loss",
            ),
            (
                self.eval_steps is not None and self.eval_strategy != "steps",
                f"eval_steps has no effect with eval_strategy={self.eval_strategy}: say eval_strategy=steps",
            ),
            (
                self.fp16_full_eval and self.bf16_full_eval,
                "fp16_full_eval and bf16_full_eval exclude each other: give one",
            ),
            (
                self.eval_delay > 0 and self.eval_strategy == "no",
                "eval_delay has no effect with eval_strategy=no: say steps or epoch",
            ),
            (
                self.metric_improvement_threshold > 0 and not self.does_evaluate,
                "metric_improvement_threshold has no effect without evaluations: set eval_strategy or "
                "min_samples_per_evaluation",
            ),
            (
                self.export_best and not self.does_evaluate,
                "export_best needs evaluations to choose by: set eval_strategy or min_samples_per_evaluation",
            ),
            (
                (self.greater_is_better not in (None, False) or self.metric_for_best_model != "loss")
                and not self.does_evaluate,
                "greater_is_better and metric_for_best_model have no effect without evaluations: set eval_strategy or "
                "min_samples_per_evaluation",
            ),
        ]

    def _compute_contradictions(self) -> list[tuple[bool, str]]:
        return [
            (self.bf16 and self.fp16, "bf16 and fp16 exclude each other: give one"),
            (
                (bool(self.gradient_checkpointing_kwargs) or self.gradient_checkpointing_keeps != "nothing")
                and not self.gradient_checkpointing,
                "gradient_checkpointing_kwargs and gradient_checkpointing_keeps have no effect without "
                "gradient_checkpointing: switch it on",
            ),
            (
                self.length_column_name != "length" and self.train_sampling_strategy != "group_by_length",
                "length_column_name has no effect but with train_sampling_strategy=group_by_length",
            ),
            (
                not self.dataloader_num_workers
                and (self.dataloader_prefetch_factor is not None or self.dataloader_persistent_workers),
                "dataloader_prefetch_factor and dataloader_persistent_workers have no effect without "
                "dataloader_num_workers: give a number of processes",
            ),
        ]

    def _osft_contradictions(self) -> list[tuple[bool, str]]:
        defaults = dataclasses.asdict(OsftArguments(osft=self.osft))
        return [
            (
                self.osft and self.osft_unfreeze_rank_ratio is None,
                "osft needs osft_unfreeze_rank_ratio, the share of each matrix that trains: 0.25 is a good start",
            ),
            (
                not self.osft and any(getattr(self, name) != value for name, value in defaults.items()),
                "the options that begin with osft_ have no effect without osft: say osft=true",
            ),
            (
                not all(isinstance(ratio, int | float) and 0 <= ratio <= 1 for ratio in self.osft_rank_ratios.values()),
                f"osft_rank_ratios = {self.osft_rank_ratios}: each ratio is a number from 0 to 1",
            ),
        ]

    def _checkpoint_contradictions(self) -> list[tuple[bool, str]]:
        never = self.save_strategy == "no"
        known = {field.name for field in dataclasses.fields(self)} | set(IDENTITIES)
        strange = [name for name in self.allow_change if name not in known]
        return [
            (
                self.save_steps != CheckpointArguments.save_steps and self.save_strategy != "steps",
                f"save_steps has no effect with save_strategy={self.save_strategy}: say save_strategy=steps",
            ),
            (
                never and (self.save_total_limit is not None or self.min_samples_per_full_checkpoint is not None),
                "save_total_limit and min_samples_per_full_checkpoint have no effect with save_strategy=no",
            ),
            (never and self.save_only_model, "save_only_model has no effect with save_strategy=no"),
            (
                (self.load_best_model_at_end or self.save_strategy == "best") and not self.does_evaluate,
                "load_best_model_at_end and save_strategy=best need evaluations to choose by: set eval_strategy or "
                "min_samples_per_evaluation",
            ),
            (
                self.load_best_model_at_end and never,
                "load_best_model_at_end needs checkpoints: set save_strategy",
            ),
            (
                bool(strange),
                f"allow_change names {', '.join(strange)}: give names of options, or {', '.join(IDENTITIES)}",
            ),
        ]

    @property
    def _tells_trackio(self) -> bool:
        settings = (self.trackio_space_id, self.trackio_bucket_id, self.trackio_static_space_id)
        return self.project != LoggingArguments.project or any(setting is not None for setting in settings)

    @property
    def does_evaluate(self) -> bool:
        """Whether some option asks for evaluation during or after training."""
        return (
            self.eval_strategy != "no"
            or self.min_samples_per_evaluation is not None
            or self.eval_on_start
            or self.eval_at_end
        )

    def in_steps(self, name: str, max_steps: int) -> int:
        """Give logging_steps, eval_steps or save_steps as steps of a run of `max_steps` (-1: as many as there are)."""
        interval = self.logging_steps if (given := getattr(self, name)) is None else given
        if interval < 1 and max_steps <= 0:
            raise UsageError(f"{name} = {interval} is a share of all steps, which are not known: give max_steps")
        return math.ceil(interval * max_steps) if interval < 1 else int(interval)

    @property
    def order_seed(self) -> int:
        """What the order of the training samples is drawn from."""
        return self.seed if self.data_seed is None else self.data_seed

    def __getattr__(self, name: str) -> Any:
        """Read an option by its other name; one of transformers that is not here, say fsdp, as what may be given."""
        return getattr(self, ALIASES[name]) if name in ALIASES else foreign_value(name)

    @property
    def longest_sample(self) -> int:
        """Most tokens that a sample may have."""
        return min(self.max_length or self.max_tokens_per_rank, self.max_tokens_per_rank)

    def to_dict(self) -> dict[str, Any]:
        """Give every option as plain JSON values, without secrets."""
        secret = {field.name for field in dataclasses.fields(self) if not field.repr}
        options = dataclasses.asdict(self).items()
        return {name: SECRET if name in secret and value else plain(value) for name, value in options}

    def as_given(self) -> dict[str, Any]:
        """Give every option without what was derived from others, so that it is derived anew where these change."""
        unset = self._defaults()
        derived = {name for name, value in self._derived().items() if getattr(self, name) == value}
        given = {name: getattr(self, name) for name in unset}
        return given | {name: unset[name] for name in derived - {"torch_compile"}}

    def to_json_string(self) -> str:
        """Give every option as readable JSON; `from_mapping(json.loads(...))` is its inverse."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Give every option as a number, a truth value or text, which is what trackers take."""
        return {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in self.to_dict().items()
        }

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from parsed YAML or JSON; what YAML misreads (1e-4 as text, no as false) is put right."""
        hints = types_of(cls)
        return cls(**{name: as_meant(value, hints.get(ALIASES.get(name, name))) for name, value in options.items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Build from a YAML file."""
        return cls.from_mapping(read_yaml(path))


@dataclasses.dataclass
class Seq2SeqTrainingArguments(GenerationArguments, TrainingArguments):  # the last base's options come first
    """Every option of a run of Seq2SeqTrainer.

    Raises:
        UsageError: an option is unknown, of the wrong type, out of range, or has no effect beside the others.
    """

    def _contradictions(self) -> list[tuple[bool, str]]:
        settings = (self.generation_max_length, self.generation_num_beams)
        return [
            *super()._contradictions(),
            (
                not self.predict_with_generate and any(setting is not None for setting in settings),
                "generation_max_length and generation_num_beams have no effect without predict_with_generate",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Give every option as plain JSON values."""
        options = super().to_dict()
        if hasattr(self.generation_config, "to_dict"):
            options["generation_config"] = self.generation_config.to_dict()
        return options


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        UsageError: the file cannot be read, is not YAML, or is not a list of `name: value`.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        options = yaml.safe_load(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"configuration {path}: {error}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        found = ", ".join(map(repr, options)) if isinstance(options, dict) else type(options).__name__
        raise UsageError(f"configuration {path}: expected lines of `option: value`, found {found}")
    node: Any = yaml.compose(text, yaml.SafeLoader)
    names = [name.value for name, _ in node.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"configuration {path}: {', '.join(twice)} stands there more than once: give it once")
    return options
