"""The faults of docs/reliability.md, tried anew: one table of how often each was tried, what passed, how long it took.

python -m tests.reliability             every fault of the table
python -m tests.reliability kills 20    20 more of the 98 runs that are killed up to 5 times each; those that ended well
                                        are kept in build/kills.jsonl, so that all of them can be run in pieces
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DONE = ROOT / "build" / "kills.jsonl"
NUM_RUNS, NUM_DEFAULT = 98, 4  # of tests/system/test_faults.py
USUAL = "a_run_ends_bit_for_bit_as_if_it_had_not"
BATCH = 10
ANYWHERE = "(killed_anywhere and not many_times) or test_torchrun"
FILES = ("tests/test_checkpoint_records.py", "tests/test_run_dir.py")
FAULTS: tuple[tuple[str, tuple[str, ...]], ...] = (  # what is tried, words for pytest
    (
        "kill -9 anywhere",
        ("tests/system/test_faults.py", "tests/system/test_torchrun.py", "-k", "killed_anywhere or torchrun"),
    ),
    ("a rank is killed, hangs or raises", ("tests/system/test_faults.py", "-k", "killed_rank or hanging or exception")),
    ("the host of the store is frozen", ("tests/system/test_faults.py", "-k", "frozen")),
    ("a rank dies while another works", ("tests/system/test_faults.py", "-k", "dies_while")),
    ("one rank works longer than ddp_timeout", ("tests/system/test_faults.py", "-k", "long_work")),
    ("the launcher is killed or signalled", ("tests/system/test_processes.py", "-k", "launcher")),
    ("two nodes: cable out, cut, node killed", ("tests/system/test_nodes.py",)),
    ("the disk is full", ("tests/test_checkpoint_storage.py", "tests/system", "-k", "full_disk")),
    ("records of the wrong form", ("tests/test_checkpoint_records.py", "-k", "no_record")),
    (
        "damaged, renamed and foreign files",
        ("tests/test_checkpoint_records.py", "tests/test_run_dir.py", "-k", "not no_record"),
    ),
    ("ranks that differ", ("tests/laws/test_agreement.py",)),
    ("NaN and infinity", ("tests/test_nonfinite.py", "tests/system/test_faults.py", "-k", "nonfinite or nan")),
    ("a display that fails", ("tests/system/test_processes.py", "-k", "display")),
    ("data, configs and checkpoints with code", ("tests/laws/test_data_is_not_code.py",)),
)


def main(words: Sequence[str]) -> int:
    """Run what the words name; return the exit code."""
    if words and words[0] == "kills":
        return run_kills(int(words[1]) if len(words) > 1 else NUM_RUNS)
    print("| fault | passed | failed | skipped | seconds |\n|---|---|---|---|---|", flush=True)
    num_failed = 0
    for fault, chosen in FAULTS:
        cases = run_tests(chosen)
        verdicts = [verdict for verdict, _ in cases.values()]
        counts = [verdicts.count(verdict) for verdict in ("passed", "failed", "skipped")]
        seconds = sum(seconds for _, seconds in cases.values())
        print(f"| {fault} | {counts[0]} | {counts[1]} | {counts[2]} | {seconds:.0f} |", flush=True)
        num_failed += counts[1] + (not sum(counts))
    return int(num_failed > 0)


def run_kills(count: int) -> int:
    """Run so many of the runs that have not passed yet, and say how many of all have."""
    DONE.parent.mkdir(exist_ok=True)
    passed = {json.loads(line)["seed"] for line in DONE.read_text().splitlines()} if DONE.exists() else set()
    left = [seed for seed in range(NUM_RUNS) if seed not in passed][:count]
    failed: list[int] = []
    for first in range(0, len(left), BATCH):  # starting pytest takes as long as a run
        tests = []
        for seed in left[first : first + BATCH]:
            kind = "many_times" if seed >= NUM_DEFAULT else USUAL
            tests.append(f"tests/system/test_faults.py::test_killed_anywhere_{kind}[{seed}]")
        for name, (verdict, seconds) in run_tests(tests).items():
            seed = int(name.partition("[")[2].removesuffix("]"))
            print(f"run {seed}: {verdict} in {seconds:.0f} s", flush=True)
            if verdict != "passed":
                failed.append(seed)
                continue
            passed.add(seed)
            with DONE.open("a") as file:
                file.write(json.dumps({"seed": seed, "seconds": seconds}) + "\n")
    print(f"{len(passed)} of {NUM_RUNS} runs ended bit-equal; failed now: {failed or 'none'}")
    return int(bool(failed))


def run_tests(words: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Run tests, slow ones too; return the verdict of each and its seconds, by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n0", *words, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "RUN_SLOW": "1"}, capture_output=True, check=False)
        cases = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            verdict = "skipped" if "skipped" in kinds else "failed" if kinds & {"failure", "error"} else "passed"
            cases[f"{case.get('classname')}::{case.get('name')}"] = verdict, float(case.get("time", 0))
    return cases


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
