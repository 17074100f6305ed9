"""`trainer verify`: whether checkpoints are whole, to the last byte and the last tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.cli.check import check_folder
from trainer.cli.parse import parse_alone, positional
from trainer.errors import CheckpointError, UsageError


@dataclass
class VerifyOptions:
    """Check every file of checkpoints against what was written, and say which a resume would take."""

    folder: Path = positional("A checkpoint, or a folder that holds some, or a run's output.")


def run(words: Sequence[str]) -> int:
    """Check, say what was found, give the exit code: 0 if every checkpoint is whole."""
    options = parse_alone("trainer verify", words, VerifyOptions)
    check_folder("folder", options.folder)
    from rich.console import Console

    from trainer.checkpoint.manifest import find_unlisted
    from trainer.checkpoint.verify import find_damage

    num_damaged = 0
    for folder in find_checkpoints(options.folder):
        with Console(stderr=True).status(f"reading {folder}"):
            faults = find_damage(folder)
        print(f"{folder}: {'damaged' if faults else 'whole'}", *faults, sep="\n  ")
        try:
            for name in find_unlisted(folder):
                print(f"  also holds {name}, which the trainer did not write")
        except CheckpointError:  # it has no manifest, which was said
            pass
        num_damaged += bool(faults)
    return 1 if num_damaged else 0


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that a folder is or holds, newest first.

    Raises:
        UsageError: there are none.
    """
    from trainer.checkpoint import manifest

    if manifest.step_of(folder.resolve()) >= 0 or (folder / manifest.MANIFEST).is_file():
        return [folder]
    found = manifest.list_checkpoints(folder / manifest.FOLDER) or manifest.list_checkpoints(folder)
    if not found:
        raise UsageError(f"{folder}: holds no checkpoint; name one, or the output_dir of a run that saved some")
    return found
