"""Real processes: torchrun, signals, a full disk, a killed rank, start-up time."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.corpora import write_chats
from tests.fixtures.models import save_model
from tests.fixtures.tokenizers import build_tokenizer
from tests.fixtures.tolerances import LAYOUT_FP32
from trainer.cli.main import main

SECONDS_TO_NOTICE = 30  # from the death of a rank to the end of the job
HELP_CPU_SECONDS = 0.5  # of `trainer --help`, beyond a bare interpreter


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

    def start(self, *extra: str, **popen: Any) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "train", *self.words(), *extra],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **popen,
        )
        return self.process

    def finish(self) -> tuple[int, str]:
        assert self.process is not None
        output, _ = self.process.communicate(timeout=100)
        return self.process.returncode, output

    def run(self, *extra: str, **popen: Any) -> tuple[int, str]:
        self.start(*extra, **popen)
        return self.finish()

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
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def test_two_ranks_under_torchrun_do_the_run_of_one(job: Job) -> None:
    assert main(["train", *job.words(), "--max-steps=3"]) == 0
    alone = job.lines()
    code, output = job.run("--max-steps=3", "--overwrite-output-dir", "--nproc-per-node=2")
    assert code == 0, output
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in job.lines()] == pytest.approx([line[name] for line in alone], rel=LAYOUT_FP32)
    assert [path.name for path in job.exports()] == ["samples_12"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_saves(job: Job, number: signal.Signals, code: int) -> None:
    process = job.start("--max-steps=100000")
    job.wait_for_step(2)
    process.send_signal(number)
    ended, output = job.finish()
    assert ended == code, output
    assert "stopped by a signal after step" in output
    assert [path.name for path in job.exports()] == [f"samples_{sum(line['num_samples'] for line in job.lines())}"]


def test_a_signal_to_the_launcher_reaches_all_ranks(job: Job) -> None:
    process = job.start("--max-steps=100000", "--nproc-per-node=2")
    job.wait_for_step(2)
    process.send_signal(signal.SIGTERM)
    ended, output = job.finish()
    assert ended == 143, output
    assert len(job.exports()) == 1, output


def test_a_killed_rank_ends_the_job_and_is_named(job: Job) -> None:
    process = job.start("--max-steps=100000", "--nproc-per-node=2")
    job.wait_for_step(2)
    victim = rank_process(process.pid, rank=1)
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


@pytest.mark.parametrize("size", [2_000, 60_000], ids=["metrics", "weights"])
def test_a_full_disk_is_a_message_and_code_1(job: Job, size: int) -> None:
    assert main(["prepare", *[word for word in job.words() if "output-dir" not in word]]) == 0  # while there is room

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    code, output = job.run("--max-steps=100", "--overwrite-output-dir", preexec_fn=limit)
    assert code == 1, output
    assert "trainer: error:" in output
    assert "File too large" in output
    assert "Traceback" not in output
    assert job.exports() == []


def test_help_answers_at_once() -> None:
    def cpu_seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    bare = cpu_seconds("-c", "pass")
    # One quick answer is proof; a slow one may be the fault of whatever else runs on the machine.
    assert any(cpu_seconds("-m", "trainer", "train", "--help") - bare < HELP_CPU_SECONDS for _ in range(10))


def test_torchrun_starts_the_flags_of_mini_trainer(job: Job) -> None:
    options = {"max-tokens-per-gpu": 512, "learning-rate": 0.01, "max-steps": 2, "training-mode": "step"}
    names = ("data-path", "output-dir", "model-name-or-path", "batch-size")
    words = [f"--{name}={value}" for name, value in (options | {name: job.options[name] for name in names}).items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "trainer.train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(job.folder)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in job.lines()] == [1, 2]
