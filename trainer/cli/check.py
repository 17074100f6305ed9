"""What a command refuses before torch is imported: mistakes that a look at the options and at file names shows.

`train` and `plan` refuse the same. Invariant: nothing here reads more than a folder's list of files.
"""

from __future__ import annotations

import re
from pathlib import Path

from trainer.config.arguments import TrainingArguments
from trainer.config.choices import check_choices
from trainer.config.fields import as_list
from trainer.config.rules import COMMAND_RULES, check_data_kind, check_rules
from trainer.errors import UsageError

_LOOKS_LIKE_A_PATH = ("/", "./", "../", "~")


def check_before_start(args: TrainingArguments, *, needs_model: bool = True) -> None:
    """Raise where the run that the options describe cannot begin.

    Args:
        args: the options.
        needs_model: whether a model or the config of one must be named.

    Raises:
        UsageError: a file is missing, a name is unknown, or options contradict each other.
        MissingPackageError: an option needs a package that is not installed.
    """
    check_data_kind(args, "token data")
    check_rules(args, COMMAND_RULES)
    check_choices(args.optim, args.lr_scheduler_type, list(args.report_to), args.use_liger_kernels)
    if args.data_path is None and not args.data_mixture:
        raise UsageError("data_path is missing: name the files to train on, or a prepared folder")
    check_files(args)
    if needs_model and args.model_name_or_path is None and args.model_config is None:
        raise UsageError("model_name_or_path is missing: name a model, or model_config for random weights")
    if needs_model and args.model_name_or_path is None and args.tokenizer_name_or_path is None:
        raise UsageError("tokenizer_name_or_path is missing: model_config has no tokenizer")


def check_files(args: TrainingArguments) -> None:
    """Raise UsageError where an option names a file or folder that is not there, or the wrong one."""
    data = [(name, path) for name in ("data_path", "validation_data_path") for path in as_list(getattr(args, name))]
    data += [("data_mixture", path) for entry in args.data_mixture for path in as_list(entry.get("path"))]
    others = [(name, getattr(args, name)) for name in ("chat_template", "model_config")]
    for name, given in data:
        if isinstance(given, str):
            check_data(name, given)
    for name, given in others:
        if isinstance(given, str) and not _is_there(given):
            raise UsageError(f"{name} = {given!r}: there is no such file or folder{_similar(Path(given))}")
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        given = getattr(args, name)
        if isinstance(given, str):
            _check_model_folder(name, given)
    resumed = args.resume_from_checkpoint
    if isinstance(resumed, str) and resumed not in ("auto", "true") and not Path(resumed).exists():
        raise UsageError(f"resume_from_checkpoint = {resumed!r}: there is no such folder{_similar(Path(resumed))}")


def check_place(name: str, given: str) -> None:
    """Raise UsageError where a model is named by a path, not by a name on the hub, and nothing is there."""
    if not Path(given).exists() and (given.startswith(_LOOKS_LIKE_A_PATH) or given.count("/") > 1):
        raise UsageError(f"{name} = {given!r}: there is no such folder{_similar(Path(given))}")


def check_folder(name: str, folder: Path) -> None:
    """Raise UsageError where a folder is not there."""
    if not folder.is_dir():
        raise UsageError(f"{name} = {str(folder)!r}: there is no such folder{_similar(folder)}")


def check_data(name: str, given: str) -> None:
    """Raise UsageError where data is named that is not there."""
    if not _is_there(given):
        advice = _similar(Path(given))
        if not advice and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
            advice = f"; a data set on the hub is named hf://datasets/{given}"
        raise UsageError(f"{name} = {given!r}: there is no such file or folder{advice}")


def _check_model_folder(name: str, given: str) -> None:
    check_place(name, given)
    folder = Path(given)
    if not folder.exists():
        return
    files = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
    if not folder.is_dir() or any((folder / file).is_file() for file in files):
        return
    if (folder / "manifest.json").is_file():
        raise UsageError(
            f"{name} = {given!r} is a checkpoint, from which a run goes on (resume_from_checkpoint): "
            f"`trainer export {given} FOLDER` writes its weights as a model"
        )
    weights = folder if folder.name == "hf_format" else folder / "hf_format"
    exports = [path for path in weights.glob("samples_*") if (path / "config.json").is_file()]
    if exports:
        newest = max(exports, key=lambda path: int(path.name.removeprefix("samples_")))
        raise UsageError(f"{name} = {given!r} is the folder of a run: its newest weights are in {str(newest)!r}")
    if (folder / "checkpoints").is_dir() or (folder / "training_params.json").is_file():
        raise UsageError(
            f"{name} = {given!r} is the folder of a run that exported no weights: `trainer export {given} FOLDER` does"
        )
    raise UsageError(f"{name} = {given!r}: the folder holds no config.json")


def _is_there(given: str) -> bool:
    """Return whether a path exists, or is a name of the hub or a pattern, of which only reading tells."""
    return given.startswith("hf://") or any(c in given for c in "*?[") or Path(given).expanduser().exists()


def _similar(missing: Path) -> str:
    """Name what lies in the folder where something is missing, if its name is like that."""
    import difflib

    try:
        found = [path.name for path in missing.parent.iterdir()]
    except OSError:
        return f"; the folder {str(missing.parent)!r} does not exist either"
    near = difflib.get_close_matches(missing.name, found, n=1)
    return f"; did you mean {str(missing.parent / near[0])!r}?" if near else ""
