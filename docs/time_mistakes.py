"""Make ten typical mistakes and time them: `python docs/time_mistakes.py`, for the table of docs/errors.md.

Processor time is told, beyond that of a Python which does nothing, so that a busy machine changes little.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROUNDS = 3
LONGEST = 180  # characters of a message
MISTAKES = {
    "a file that is not there": "trainer train --data-path chat.jsonl",
    "an optimizer by a half-known name": "trainer train --optim adamw",
    "a package that is not installed": "trainer train --optim stable_adamw",
    "a typo in an option": "trainer train --lerning-rate 1e-5",
    "a word for a number": "trainer train --batch-size many",
    "an option of another tool": "trainer train --deepspeed zero3.json",
    "a typo in a file": "trainer train run.yaml",
    "the folder of a run as a model": "trainer train --model-name-or-path outputs/run --data-path chats.jsonl",
    "an option without effect": "trainer train --eval-steps 50",
    "a command that is none": "trainer trian",
}


def shortened(said: str) -> str:
    """Return what is said, cut where it goes on and on."""
    return textwrap.shorten(said, LONGEST, placeholder=" ...")


def write_files(folder: Path) -> None:
    """Write what the commands name."""
    (folder / "chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (folder / "run.yaml").write_text("data_path: chats.jsonl\nnum_epochs: 3\n")
    weights = folder / "outputs" / "run" / "hf_format" / "samples_64"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_text("")
    (folder / "outputs" / "run" / "training_params.json").write_text("{}")


def time_command(words: list[str], folder: Path) -> tuple[float, int, str]:
    """Return processor seconds, exit code and what was said on stderr."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
        said.seek(0)
        return used.ru_utime + used.ru_stime, process.returncode, said.read().decode()


def main() -> None:
    """Print the table."""
    seconds: dict[str, list[float]] = {name: [] for name in ["", *MISTAKES]}
    codes, told = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        for _ in range(ROUNDS):
            seconds[""].append(time_command([sys.executable, "-c", "pass"], folder)[0])
            for mistake, command in MISTAKES.items():
                words = [sys.executable, "-m", *shlex.split(command)]
                used, codes[mistake], told[mistake] = time_command(words, folder)
                seconds[mistake].append(used)
    start = statistics.median(seconds[""])
    print("| mistake | command | seconds | exit code | what is said |\n|---|---|---|---|---|")
    for mistake, command in MISTAKES.items():
        used = statistics.median(seconds[mistake]) - start
        said = shortened(told[mistake].removeprefix("trainer: error: "))
        print(f"| {mistake} | `{command}` | {used:.2f} | {codes[mistake]} | {said} |")


if __name__ == "__main__":
    main()
