"""The command `trainer`: finds the subcommand, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by a signal after saving. Imports no torch; the module
of a subcommand is imported only when it is called, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from trainer import __version__
from trainer.cli.logs import asks_for_help, display_that_may_fail, level_in, logs_on_stderr
from trainer.config.suggest import nearest
from trainer.distributed.orphan import end_with_launcher
from trainer.errors import PeerError, TrainerError, UsageError

COMMANDS = {
    "init": "write a commented YAML file to start from",
    "train": "prepare the data, train, evaluate, save",
    "prepare": "tokenize a data set and report what is in it",
    "preview": "show samples, and what of them is trained",
    "plan": "predict steps, micro-batches and packing, for any number of ranks",
    "evaluate": "measure loss and scores of a run, a checkpoint or any model",
    "generate": "answer a prompt, a file of chats, or a chat in the terminal",
    "export": "write Hugging Face weights in another type",
    "verify": "check that checkpoints are whole",
    "report": "draw what a run did, or several over each other",
    "doctor": "look at this machine: versions, speed, disk, what is wrong",
    "replay": "run a step again whose loss or gradient was not finite",
}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        print(f"trainer {__version__}")
        return 0
    return run_command(words[0], words[1:])


def run_command(name: str, words: list[str]) -> int:
    """Find and run one subcommand."""
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        advice = f"did you mean {near!r}?" if near else f"one of {', '.join(COMMANDS)}"
        return fail(f"unknown command {name!r}: {advice}", EXIT_USAGE)
    # What `train` does lies in its folder; of others the output is the result.
    is_result = name != "train" or asks_for_help(words)
    with display_that_may_fail(is_result=is_result) as shown, logs_on_stderr(level_in(words)):
        code = report_errors(lambda words: int(importlib.import_module(f"trainer.cli.{name}").run(words)), words)
        shown.flush()
        is_lost = shown.error is not None and not isinstance(shown.error, BrokenPipeError)
        return code or (EXIT_FAILED if is_lost and name != "train" else 0)


def report_errors(run: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Run a command; a user's error becomes one message on stderr and an exit code."""
    end_with_launcher()
    try:
        return run(words)
    except UsageError as error:
        return fail(str(error), EXIT_USAGE)
    except PeerError:
        return EXIT_FAILED
    except TrainerError as error:
        return fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return fail("interrupted", EXIT_INTERRUPTED)


def fail(message: str, code: int) -> int:
    """Print an error and return its exit code."""
    print(f"trainer: error: {message}", file=sys.stderr)
    return code


def usage() -> str:
    """Return the overview of all commands."""
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trainer COMMAND [CONFIG.yaml] [--option value ...]",
            "",
            "The reference trainer for fine-tuning language models.",
            "",
            *lines,
            "",
            "`trainer COMMAND --help` lists the options of a command; --version prints the version.",
        ]
    )
