"""`trainer replay`: run a step that was not taken again, on one process, and show where the first bad value appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.cli.check import check_folder
from trainer.cli.parse import parse_alone, positional
from trainer.config.fields import option


@dataclass
class ReplayOptions:
    """Run a step again whose loss or gradient was not finite, and say which layer or sample made it so."""

    folder: Path = positional("crash/step_N of a run.")
    use_cpu: bool = option(False, "Stay on the CPU although a GPU is there.")
    trust_remote_code: bool = option(False, "Run code that comes with a model of the hub.")


def run(words: Sequence[str]) -> int:
    """Replay, say what was found, give the exit code."""
    options = parse_alone("trainer replay", words, ReplayOptions)
    check_folder("folder", options.folder)
    from rich.console import Console

    from trainer.atomic import read_json
    from trainer.config.arguments import TrainingArguments
    from trainer.distributed.group import Group
    from trainer.errors import UsageError
    from trainer.training.nonfinite import CRASH, replay

    if not (options.folder / CRASH).is_file():
        raise UsageError(f"{options.folder}: holds no record of a step; name crash/step_N of a run")
    about = read_json(options.folder / CRASH)
    print(about["what"])
    print(
        f"epoch {about['epoch']}, {about['num_samples']} samples from number {about['first_sample']} of its order "
        f"with seed {about['seed']}"
    )
    with Group.join(TrainingArguments(use_cpu=options.use_cpu)) as group, Console(stderr=True).status("replaying"):
        finding = replay(options.folder, group, trust_remote_code=options.trust_remote_code)
    if finding is None:
        print("every value is finite this time: the cause is not in weights, data or dropout")
    else:
        print(f"first non-finite value: rank {finding.rank}, micro-batch {finding.micro_batch}, {finding.place}")
    return 0
