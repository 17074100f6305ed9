"""Real processes: torchrun, signals, a full disk, a killed rank, start-up time.

A fresh interpreter takes seconds to import torch and transformers. So only what is about torchrun and the launcher
starts some; the others run the command line on new ranks (`launch` without a group: torchrun's environment).
"""

import fcntl
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import trainer.train
from tests.fixtures.corpora import write_chats
from tests.fixtures.models import save_model
from tests.fixtures.ranks.faults import Fault, disk_full, kill, send
from tests.fixtures.ranks.injection import faults_installed
from tests.fixtures.ranks.launch import Launch, Outcomes
from tests.fixtures.tokenizers import build_tokenizer
from tests.fixtures.tolerances import LAYOUT_FP32
from tests.fixtures.torchrun import under_torchrun
from trainer.cli.main import COMMANDS, main
from trainer.distributed.launch import _cause, run_on_ranks
from trainer.errors import RankError

SECONDS_TO_NOTICE = 45  # from the death of a rank to the end of the job: idle machine 2, 30 if torchrun must insist
SECONDS_TO_END = 15  # from the death of the launcher to the end of its ranks: 3.5 on an idle machine
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
HELP_COST = 4  # of `trainer train --help`, next to importing what reads the command line


class Job:
    """One `trainer train` over a few chats, as a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "run"
        build_tokenizer().save_pretrained(folder / "model")
        save_model(folder / "model", vocab_size=320, max_position_embeddings=512)
        self.options: dict[str, Any] = {
            "data-path": write_chats(folder / "chats.jsonl", 12),
            "data-cache-dir": folder / "cache",
            "dataset-num-proc": 1,
            "output-dir": self.output,
            "model-name-or-path": folder / "model",
            "batch-size": 4,
            "max-tokens-per-rank": 512,
        }
        self.process: subprocess.Popen[str] | None = None

    def words(self) -> list[str]:
        return [f"--{name}={value}" for name, value in self.options.items()]

    def start(self, *words: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HOME": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self.process

    def finish(self) -> tuple[int, str]:
        assert self.process is not None
        output, _ = self.process.communicate(timeout=100)
        return self.process.returncode, output

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 100
        while len(self.lines()) < step:
            assert time.monotonic() < deadline
            assert self.process is not None
            assert self.process.poll() is None, self.process.stdout and self.process.stdout.read()
            time.sleep(0.05)

    def lines(self) -> list[dict[str, Any]]:
        file = self.output / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def exports(self) -> list[Path]:
        return list(self.output.glob("hf_format/samples_*"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    if made.process is not None:
        with made.process:  # closes its pipe
            made.process.terminate()


def train(launch: Launch, world_size: int, job: Job, *extra: str, faults: Sequence[Fault] = ()) -> Outcomes:
    """What `trainer train` comes to on ranks that find themselves as torchrun would have started them."""
    return launch(world_size, main, ["train", *job.words(), *extra], faults=faults, group=False)


def test_two_ranks_do_the_run_of_one(launch: Launch, job: Job) -> None:
    assert train(launch, 1, job, "--max-steps=3").values == [0]
    alone = job.lines()
    assert train(launch, 2, job, "--max-steps=3", "--overwrite-output-dir").values == [0, 0]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in job.lines()] == pytest.approx([line[name] for line in alone], rel=LAYOUT_FP32)
    assert [path.name for path in job.exports()] == ["samples_12"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_saves(launch: Launch, job: Job, number: signal.Signals, code: int) -> None:
    (ended,) = train(launch, 1, job, "--max-steps=100000", faults=[send(0, number, at=("step", 3))])
    assert ended.value == code, ended.log
    last = job.lines()[-1]["step"]
    assert last in (3, 4)  # at the next look at what has come
    assert f"stopped by a signal after step {last}" in ended.log
    assert [path.name for path in job.exports()] == [f"samples_{sum(line['num_samples'] for line in job.lines())}"]


def main_with_broken_display(stdout: str | None, closes_stderr: bool, words: list[str]) -> int:
    """Run a command whose stdout nobody reads, or lies on a full disk."""
    if stdout == "pipe":
        reads, writes = os.pipe()
        os.close(reads)
        os.dup2(writes, 1)
    elif stdout is not None:
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
    if closes_stderr:
        os.close(2)
        sys.stderr = None
    try:
        return main(words)
    except SystemExit as ended:  # of --help
        return int(ended.code or 0)


def test_a_display_that_fails_ends_no_run(launch: Launch, job: Job) -> None:
    words = ["train", *job.words(), "--max-steps=2"]
    note = "trainer: note: stdout cannot be written ({}): nothing more is shown"
    (ended,) = launch(1, main_with_broken_display, "pipe", False, words, group=False)
    assert ended.value == 0, ended.log
    assert ended.log.count(note.format("Broken pipe")) == 1
    assert "Traceback" not in ended.log
    assert len(job.lines()) == 2
    again = [*words, "--overwrite-output-dir"]
    assert launch(1, main_with_broken_display, "/dev/full", True, again, group=False).values == [0]
    assert len(job.lines()) == 2
    # Of other commands the output is the result.
    plan = ["plan", *job.words()]
    (ended,) = launch(1, main_with_broken_display, "/dev/full", False, plan, group=False)
    assert ended.value == 1
    assert note.format("No space left on device") in ended.log
    for read_in_part in (plan, ["train", "--help"], ["report", "--help"]):
        (ended,) = launch(1, main_with_broken_display, "pipe", False, read_in_part, group=False)
        assert ended.value == 0
        assert "cannot be written" not in ended.log


def run_on_two(module: str, *words: str) -> tuple[int | None, str]:
    """Exit code of a job on two ranks, and the message of the error instead of it."""
    try:
        return run_on_ranks(2, module, words), ""
    except RankError as error:
        return None, str(error)


def test_the_cause_is_whoever_torchrun_did_not_end_itself() -> None:
    codes = [-signal.SIGTERM, 1, -signal.SIGKILL, 2]
    failures = {rank: ProcessFailure(rank, 0, code, error_file="none") for rank, code in enumerate(codes)}
    assert _cause(failures)[0] == 2
    del failures[2]
    assert _cause(failures)[0] == 1


def test_a_job_that_refuses_something_fails_with_its_message_and_nothing_else(launch: Launch) -> None:
    (ended,) = launch(1, run_on_two, "trainer", "nonsense", group=False)
    assert ended.value == (2, "")
    assert set(filter(None, ended.log.splitlines())) == {
        "trainer: error: unknown command 'nonsense': one of " + ", ".join(COMMANDS)
    }


def test_a_killed_rank_is_named_by_the_launcher(launch: Launch) -> None:
    dies = "import os, time; int(os.environ['RANK']) == 1 and os.kill(os.getpid(), 9); time.sleep(60)"
    (ended,) = launch(1, run_on_two, "timeit", "-n1", "-r1", dies, group=False)
    code, message = ended.value
    assert code is None
    assert re.fullmatch(r"rank 1 \(pid \d+\) was killed by SIGKILL, and the others were ended", message)
    assert "Traceback" not in ended.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_reaches_all_ranks(launch: Launch, tmp_path: Path, number: signal.Signals) -> None:
    """What ranks do about it stands above; here they note it down and end as a trainer would."""
    note = f"""
import os, pathlib, signal, sys, time
here = pathlib.Path({str(tmp_path)!r}, os.environ["RANK"])
other = here.with_name("10"[int(here.name)])
def wait_for(word):
    while not other.exists() or other.read_text() != word: time.sleep(0.01)
def end(*_):
    here.write_text("signalled")
    wait_for("signalled")  # torchrun ends by SIGTERM who is left once one rank has ended
    os._exit({128 + number})
signal.signal({int(number)}, end)
here.write_text("ready")
if here.name == "0":
    wait_for("ready")
    os.kill(os.getppid(), {int(number)})
time.sleep(60)
"""
    (ended,) = launch(1, run_on_two, "timeit", "-n1", "-r1", note, group=False)
    assert ended.value == (128 + number, ""), ended.log
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["signalled", "signalled"]


def test_ranks_end_soon_after_a_killed_launcher_and_give_free_what_they_locked(launch: Launch, tmp_path: Path) -> None:
    """One ends at once, as while it starts; one goes on, as in a step that takes long."""
    note = f"""
import fcntl, os, pathlib, signal, time
from trainer.distributed.orphan import end_with_launcher
end_with_launcher()
here = pathlib.Path({str(tmp_path)!r}, os.environ["RANK"])
lock = here.open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
if here.name == "0":
    while not (other := here.with_name("1.ready")).exists(): time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGKILL)
else:
    signal.signal(signal.SIGTERM, lambda *_: None)
    here.with_name("1.ready").touch()
while True: time.sleep(60)
"""
    (ended,) = launch(1, run_on_two, "timeit", "-n1", "-r1", note, group=False)
    assert ended.signal == "SIGKILL", ended.log
    deadline = time.monotonic() + SECONDS_TO_END
    for rank in "01":
        with (tmp_path / rank).open() as lock:
            while not is_free(lock):
                assert time.monotonic() < deadline
                time.sleep(0.05)


def is_free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def words_of_mini_trainer(job: Job) -> list[str]:
    options = {"max-tokens-per-gpu": 512, "learning-rate": 0.01, "max-steps": 100_000, "training-mode": "step"}
    names = ("data-path", "output-dir", "model-name-or-path", "batch-size")
    return [f"--{name}={value}" for name, value in (options | {name: job.options[name] for name in names}).items()]


def rank_of_mini_trainer(words: list[str]) -> None:
    sys.argv = ["trainer.train", *words]
    with faults_installed([kill(1, at=("step", 3))] if os.environ["RANK"] == "1" else []):
        runpy.run_path(trainer.train.__file__, run_name="__main__")


def mini_trainer_under_torchrun(words: list[str]) -> str:
    with pytest.raises(ChildFailedError) as failed:
        under_torchrun(2, rank_of_mini_trainer, words)
    return str(failed.value)


def test_torchrun_starts_the_flags_of_mini_trainer_and_names_a_killed_rank(launch: Launch, job: Job) -> None:
    home = {"HOME": str(job.folder)}
    (ended,) = launch(1, mini_trainer_under_torchrun, words_of_mini_trainer(job), group=False, env=home)
    assert re.search(r"rank +: 1 ", ended.value)
    assert "SIGKILL" in ended.value
    assert [line["step"] for line in job.lines()][:2] == [1, 2]


@pytest.mark.slow
def test_torchrun_in_fresh_interpreters_names_a_killed_rank(job: Job) -> None:
    words = words_of_mini_trainer(job)
    launcher = job.start(*TORCHRUN, "-m", "trainer.train", *words)
    job.wait_for_step(2)
    victim = rank_process(launcher.pid, rank=1)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    ended, output = job.finish()
    assert time.monotonic() - killed < SECONDS_TO_NOTICE
    assert ended not in (0, 2)
    assert "SIGKILL" in output
    assert f"pid: {victim}" in output


def rank_process(launcher: int, rank: int) -> int:
    """Find the process of a rank below a launcher."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            values = environment.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in values and is_below(int(environment.parts[2]), launcher):
            return int(environment.parts[2])
    raise AssertionError(f"no process of rank {rank}")


def is_below(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False


@pytest.mark.parametrize("name", ["metrics.jsonl", "*.safetensors"])
def test_a_full_disk_is_a_message_and_code_1(launch: Launch, job: Job, name: str) -> None:
    (ended,) = train(launch, 1, job, "--max-steps=2", faults=[disk_full(0, at=("write", 1, name))])
    assert ended.value == 1, ended.log
    assert "trainer: error:" in ended.log
    assert "No space left on device" in ended.log
    assert "Traceback" not in ended.log
    assert job.exports() == []


def test_help_answers_at_once() -> None:
    def cpu_seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # One quick answer is proof; a slow one may be the fault of whatever else runs on the machine.
    assert any(
        cpu_seconds("-m", "trainer", "train", "--help") < HELP_COST * cpu_seconds("-c", "import argparse, yaml, enum")
        for _ in range(10)
    )
