"""TrainingArguments: every option of a run in one flat, validated, serialisable configuration.

Flat for users, narrow for code: it inherits the groups of `groups.py`, and each part of the trainer asks for its group.
Python, YAML and the command line all end here, so an option means the same everywhere.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_origin

from trainer.config.fields import (
    Scalar,
    as_list,
    as_option,
    check_options,
    check_value,
    default_of,
    is_free_at_resume,
    parse_json,
    plain,
    types_of,
)
from trainer.config.foreign_names import ALIASES, NOT_HERE, RENAMED, WITH_VALUE
from trainer.config.groups import (
    BatchArguments,
    CheckpointArguments,
    DataArguments,
    EvaluationArguments,
    ExportArguments,
    GenerationArguments,
    HubArguments,
    LoaderArguments,
    LoggingArguments,
    LoraArguments,
    MachineArguments,
    ModelArguments,
    OptimizerArguments,
    OsftArguments,
    PredictionArguments,
    ScheduleArguments,
    ScriptArguments,
)
from trainer.config.rules import check_rules
from trainer.config.suggest import foreign_value, granted, unknown_option
from trainer.config.transformers_api import (
    NOT_GIVEN,
    FieldViews,
    NamesOfTransformers,
    OptionSetters,
    ProcessProperties,
    option_fields,
    views_of,
)
from trainer.errors import UsageError

NONE_IS_DEFAULT = (  # transformers says None where it means its default
    *("disable_tqdm", "gradient_checkpointing", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs"),
    "metric_for_best_model",
)
SECRET = "<secret>"  # instead of an option that nobody should read


class Choice(str):
    """The value of an option that is an enum in transformers."""

    @property
    def value(self) -> str:
        """The value as plain text, as of an enum."""
        return str.__str__(self)

    def __reduce__(self) -> tuple[type[Choice], tuple[str]]:
        return Choice, (self.value,)


class _OptionsMeta(type):
    """Makes constructors, of subclasses too, understand other names and answer an unknown one with the nearest.

    `dataclasses.fields` of the class lists what HfArgumentParser may turn into arguments; of an instance, all options.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "__dataclass_fields__":  # set by the decorator `dataclass`, once it has made the constructor
            value = FieldViews(value)
        super().__setattr__(name, value)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        known, foreign = _known_options(cls, options)
        kind: Any = cls
        made: Any = object.__new__(kind)
        # A constructor takes only the fields that its class listed when it was made.
        taken = views_of(cls).of_class
        vars(made)["_apart"] = {name: known.pop(name) for name in [*known] if not taken[name].init}
        made.__init__(*args, **known)
        vars(made).update(vars(made).pop("_apart", {}))  # where a subclass does not call __post_init__ of ours
        vars(made)["_foreign"] = foreign
        vars(made)["_is_complete"] = True
        return made


def _known_options(cls: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options under their own names, and those of transformers that ask for nothing we lack."""
    hints = types_of(cls)
    names = [field.name for field in option_fields(cls)]
    known: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if value is NOT_GIVEN:
            continue
        if name not in names:
            is_granted, value = granted(given, value)
            if not is_granted:
                raise unknown_option(given, names)
            if value is not None:
                foreign[given] = value
            continue
        if name in known:
            alias = next(alias for alias, meant in ALIASES.items() if meant == name)
            raise UsageError(f"{alias} is another name of {name}: give one of them")
        is_json = isinstance(value, str) and get_origin(hints[name]) is dict
        known[name] = parse_json(value) if is_json else value
    return known, foreign


@dataclasses.dataclass
class TrainingArguments(  # the last base's options come first
    OptionSetters,
    ProcessProperties,
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
    LoraArguments,
    OsftArguments,
    ModelArguments,
    ExportArguments,
    NamesOfTransformers,
    metaclass=_OptionsMeta,
):
    """Every option of a run.

    Raises:
        UsageError: an option is unknown, of the wrong type, out of range, or has no effect beside the others.
    """

    def __post_init__(self) -> None:
        vars(self).update(vars(self).pop("_apart", {}))
        for name in NOT_HERE:
            if vars(self).get(name) is NOT_GIVEN:
                del vars(self)[name]
        vars(self).update({name: value for name, value in self.defaults().items() if name not in vars(self)})
        self._complete()
        check_rules(self)

    def check(self) -> None:
        """Check every option, and derive anew what was not given: options may have been assigned since.

        Raises:
            UsageError: an option is of the wrong type, out of range, or has no effect beside the others.
        """
        unset = self.defaults()
        vars(self).update({name: unset[name] for name in self._derived_names()})
        self._complete()
        check_rules(self)

    def _complete(self) -> None:
        """Write options as they are declared, check each by itself, and derive what is not given."""
        self._normalise()
        check_options(self)
        unset, derived = self.defaults(), {}
        for name, value in self._derive().items():
            is_said_again = name not in ("do_eval", "torch_compile") and vars(self)[name] == value  # by `replace`, say
            if vars(self)[name] == unset[name] or is_said_again:
                derived[name] = value
        vars(self).update(derived)
        vars(self)["_derived"] = derived
        for name in WITH_VALUE:
            if isinstance(vars(self).get(name), str):
                vars(self)[name] = Choice(vars(self)[name])

    def _normalise(self) -> None:
        """Write as the options have it what transformers takes in other forms too."""
        options = vars(self)
        for field in dataclasses.fields(self):
            value = options[field.name]
            if field.name in NONE_IS_DEFAULT and value is None:
                options[field.name] = default_of(field)
            elif isinstance(value, enum.Enum):
                options[field.name] = value.value
        if isinstance(self.include_num_input_tokens_seen, bool):
            options["include_num_input_tokens_seen"] = "all" if self.include_num_input_tokens_seen else "no"
        if isinstance(self.allow_change, list) and all(isinstance(name, str) for name in self.allow_change):
            options["allow_change"] = [name for names in self.allow_change for name in names.split(",")]
        if self.output_dir is None:
            options["output_dir"] = ExportArguments.output_dir
        if isinstance(self.output_dir, str | os.PathLike):
            options["output_dir"] = os.path.expanduser(self.output_dir)
        options["report_to"] = [] if self.report_to in (None, "none", ["none"]) else as_list(self.report_to)

    def defaults(self) -> dict[str, Any]:
        """Return what each option is where it is not given; for report_to, as it is written once it was read."""
        defaults = {field.name: default_of(field) for field in dataclasses.fields(self)}
        return defaults | {"report_to": []}

    def _derive(self) -> dict[str, Any]:
        """Return what options are that are not given, by others; scripts read them."""
        does_compile = self.torch_compile or (self.torch_compile_backend or self.torch_compile_mode) is not None
        return {
            "greater_is_better": not self.metric_for_best_model.endswith("loss"),  # going by its name
            "eval_steps": self.logging_steps if self.eval_strategy == "steps" else None,
            "do_eval": self.do_eval or self.eval_strategy != "no",
            "torch_compile": does_compile,
            "torch_compile_backend": "inductor" if does_compile else None,
        }

    def _derived_names(self) -> list[str]:
        """Return the options that still have the value that was derived for them."""
        derived: dict[str, Any] = vars(self).get("_derived", {})
        return [name for name, value in derived.items() if vars(self)[name] == value]

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an option, checked by itself at once; how it stands to others is checked when they are used."""
        if not vars(self).get("_is_complete") or name.startswith("_"):
            super().__setattr__(name, value)
            return
        name = ALIASES.get(name, name)
        fields = {field.name: field for field in dataclasses.fields(self)}
        if name not in fields:
            if isinstance(getattr(type(self), name, None), property):
                raise AttributeError(f"{name} is found out, not set")
            is_granted, read = granted(name, value)
            if is_granted:
                vars(self)["_foreign"][name] = read
                return
            if hasattr(type(self), name):
                super().__setattr__(name, value)
                return
            raise unknown_option(name, fields)
        before = vars(self)[name]
        vars(self)[name] = value
        try:
            self._normalise()
            check_value(fields[name], types_of(type(self))[name], vars(self)[name])
        except UsageError:
            vars(self)[name] = before
            raise
        if name in WITH_VALUE:
            vars(self)[name] = Choice(vars(self)[name])

    @property
    def does_evaluate(self) -> bool:
        """Return whether some option asks for evaluation during or after training."""
        return (
            self.eval_strategy != "no"
            or self.min_samples_per_evaluation is not None
            or self.eval_on_start
            or self.eval_at_end
        )

    def in_steps(self, name: str, max_steps: int) -> int:
        """Return logging_steps, eval_steps or save_steps in steps of a run of `max_steps` (-1: all there are)."""
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
        if name.startswith("_"):
            raise AttributeError(f"TrainingArguments has no {name}")
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        given: dict[str, Any] = vars(self).get("_foreign", {})
        value = given[name] if name in given else foreign_value(name)
        return Choice(value) if name in WITH_VALUE else value

    @property
    def longest_sample(self) -> int:
        """Most tokens that a sample may have."""
        return min(self.max_length or self.max_tokens_per_rank, self.max_tokens_per_rank)

    @property
    def has_held_out_data(self) -> bool:
        """Return whether some option names data that is not trained on."""
        return bool(self.validation_split) or self.validation_data_path is not None

    def to_dict(self) -> dict[str, Any]:
        """Return every option as plain JSON values, without secrets."""
        secret = {field.name for field in dataclasses.fields(self) if not field.repr}
        options = dataclasses.asdict(self).items()
        return {name: SECRET if name in secret and value else plain(value) for name, value in options}

    def as_given(self) -> dict[str, Any]:
        """Return every option without what was derived from others, so that it is derived anew where these change."""
        unset = self.defaults()
        given = {name: vars(self)[name] for name in unset}
        return given | {name: unset[name] for name in self._derived_names()}

    def to_json_string(self) -> str:
        """Return every option as readable JSON; `from_mapping(json.loads(...))` is its inverse."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return every option as a number, a truth value or text, which is what trackers take."""
        return {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in self.to_dict().items()
        }

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from parsed YAML or JSON; what YAML misreads (1e-4 as text, no as false) is put right, at any depth."""
        return cls(**read_as_options(cls, options))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Build from a YAML file."""
        options = read_yaml(path)
        try:
            return cls.from_mapping(options)
        except UsageError as error:
            raise UsageError(f"configuration {path}: {error}") from error

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Build from what `to_dict` wrote, maybe of another class or by another version.

        Former names are understood. Rules between options are those of the version that wrote the record, so they are
        not checked again.

        Returns:
            the options, and those of the record that are unknown here or have a value that is not allowed any more.
        """
        fields = {field.name: field for field in option_fields(cls)}
        hints = types_of(cls)
        known: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for given, value in record.items():
            name = given if given in fields else RENAMED.get(given, ALIASES.get(given, given))
            try:
                if name not in fields:
                    raise unknown_option(name, fields)
                read = as_option(value, hints[name])
                check_value(fields[name], hints[name], read)
                known[name] = read
            except UsageError:
                rest[given] = value
        args = cls()
        vars(args).update(known)
        args._complete()
        return args, rest


@dataclasses.dataclass
class Seq2SeqTrainingArguments(GenerationArguments, TrainingArguments):  # the last base's options come first
    """Every option of a run of Seq2SeqTrainer.

    Raises:
        UsageError: an option is unknown, of the wrong type, out of range, or has no effect beside the others.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return every option as plain JSON values."""
        options = super().to_dict()
        if hasattr(self.generation_config, "to_dict"):
            options["generation_config"] = self.generation_config.to_dict()
        return options


def names_free_at_resume() -> frozenset[str]:
    """Return the options that a resumed run may change; what a script declares by itself is not among them."""
    return frozenset(field.name for field in option_fields(Seq2SeqTrainingArguments) if is_free_at_resume(field))


def read_as_options(cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Read each value as its option's type; a name that is no option keeps its value as it is."""
    hints = types_of(cls)
    return {name: as_option(value, hints.get(ALIASES.get(name, name), Any)) for name, value in options.items()}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options; plain words stay Scalar, to be read as the type of their option.

    Raises:
        UsageError: the file is data, cannot be read, is not YAML, or is not a list of `name: value`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain words as they stand, and refuses a name that stands twice."""

        yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012

        def construct_yaml_str(self, node: Any) -> str:
            text = self.construct_scalar(node)
            return str(text) if node.style else Scalar(text)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [name.value for name, _ in node.value if name.tag != "tag:yaml.org,2002:merge"]
            twice = sorted({str(name) for name in names if names.count(name) > 1})
            if twice:
                line = node.start_mark.line + 1
                raise ValueError(f"{', '.join(twice)} stands there more than once (from line {line}): give it once")
            return super().construct_mapping(node, deep)

    Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_yaml_str)
    if Path(path).suffix in (".jsonl", ".parquet", ".arrow", ".gz", ".zst"):
        raise UsageError(f"{path} is data by its name, and a file of options is expected: give it as data_path")
    try:
        options = Loader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"configuration {path}: {error}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        found = ", ".join(map(repr, options)) if isinstance(options, dict) else type(options).__name__
        raise UsageError(f"configuration {path}: expected lines of `option: value`, found {found}")
    return {str.__str__(name): value for name, value in options.items()}
