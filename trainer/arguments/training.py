"""TrainingArguments: every option of a run in one flat, validated, serialisable configuration.

Flat for users, narrow for code: it inherits the groups of `groups.py`, and each part of the trainer asks for its group.
Python, YAML and the command line all end here, so an option means the same everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, get_type_hints

from trainer.arguments.groups import (
    BatchArguments,
    DataArguments,
    EvaluationArguments,
    ExportArguments,
    LoggingArguments,
    MachineArguments,
    ModelArguments,
    OptimizerArguments,
    ScheduleArguments,
)
from trainer.arguments.options import check_options, unknown_option
from trainer.errors import UsageError

ALIASES = {"max_tokens_per_gpu": "max_tokens_per_rank"}
T = TypeVar("T")


def refuse_unknown_options(cls: type[T]) -> type[T]:
    """Make the dataclass's constructor answer an unknown name with the nearest valid one, and understand ALIASES."""
    build: Callable[..., None] = cls.__init__

    def __init__(self: T, *args: Any, **options: Any) -> None:
        build(self, *args, **_known_options(cls, options))

    __init__.__doc__ = build.__doc__
    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


def _known_options(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    known: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in names:
            raise unknown_option(given, names)
        if name in known:
            raise UsageError(f"{given} is another name of {name}: give one of them")
        known[name] = value
    return known


@refuse_unknown_options
@dataclasses.dataclass
class TrainingArguments(  # the last base's options come first
    MachineArguments,
    LoggingArguments,
    ExportArguments,
    EvaluationArguments,
    ScheduleArguments,
    OptimizerArguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
):
    """Every option of a run.

    Raises:
        UsageError: an option is unknown, of the wrong type, out of range, or has no effect beside the others.
    """

    def __post_init__(self) -> None:
        check_options(self)
        for is_wrong, message in self._contradictions():
            if is_wrong:
                raise UsageError(message)

    def _contradictions(self) -> list[tuple[bool, str]]:
        return [
            (
                bool(self.model_name_or_path and self.model_config),
                "model_name_or_path (loads weights) and model_config (draws them) exclude each other: give one",
            ),
            (
                bool(self.validation_split and self.validation_data_path),
                "validation_split and validation_data_path exclude each other: give one",
            ),
            (
                self.eval_strategy == "steps" and self.eval_steps is None,
                "eval_strategy=steps needs eval_steps, the number of steps between evaluations",
            ),
            (
                self.eval_steps is not None and self.eval_strategy != "steps",
                f"eval_steps has no effect with eval_strategy={self.eval_strategy}: say eval_strategy=steps",
            ),
            (self.max_steps == 0, "max_steps = 0 would train nothing: give a positive number, or -1 for no limit"),
            (
                self.export_best and not self.does_evaluate,
                "export_best needs evaluations to choose by: set eval_strategy or min_samples_per_evaluation",
            ),
        ]

    @property
    def does_evaluate(self) -> bool:
        """Whether some option asks for evaluation during or after training."""
        return (
            self.eval_strategy != "no"
            or self.min_samples_per_evaluation is not None
            or self.eval_on_start
            or self.eval_at_end
        )

    @property
    def longest_sample(self) -> int:
        """Most tokens that a sample may have."""
        return min(self.max_length or self.max_tokens_per_rank, self.max_tokens_per_rank)

    def to_dict(self) -> dict[str, Any]:
        """Give every option as plain JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Give every option as readable JSON; `from_mapping(json.loads(...))` is its inverse."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from parsed YAML or JSON; numbers that YAML leaves as text (1e-4) are read as numbers."""
        hints = get_type_hints(cls)
        return cls(**{name: _number(value, hints.get(ALIASES.get(name, name))) for name, value in options.items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Build from a YAML file."""
        return cls.from_mapping(read_yaml(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        UsageError: the file cannot be read, is not YAML, or is not a list of `name: value`.
    """
    import yaml

    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"configuration {path}: {error}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UsageError(f"configuration {path}: expected lines of `option: value`, found {type(options).__name__}")
    return options


def _number(value: Any, hint: Any) -> Any:
    """Read text as a number where the option is a float: YAML takes 1e-4 and inf for words."""
    if hint is not float or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
