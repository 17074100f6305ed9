"""Prove that the suite notices: apply each bug of bugs.py to a copy of the repository and run the test that must fail.

The test runs on the healthy copy first: a bug counts as caught only by a test that passes without it.

    python -m tests.mutants.run [--only WORD] [--list]

Exit code 1 if a bug passes its test, if a test cannot run, or if one takes longer than the limit.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

import pytest

from tests.mutants.bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 300  # a busy machine takes many times what an idle one does
COPIED = (
    "trainer",
    "tests",
    "docs",
    "examples",
    "benchmarks",
    "pyproject.toml",
    "setup.py",
    "conftest.py",
    "README.md",
)


def mutate(bug: Bug, root: Path) -> str:
    """Return the text of the bug's file with the bug in it.

    Raises:
        ValueError: the text to replace does not stand exactly once in a function of that name.
    """
    text = (root / bug.file).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    places = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == bug.function:
            assert node.end_lineno is not None
            body = "".join(lines[node.lineno - 1 : node.end_lineno])
            if bug.old in body:
                places.append((node.lineno, node.end_lineno, body))
    if len(places) != 1 or places[0][2].count(bug.old) != 1:
        raise ValueError(f"{bug.file}: {bug.old!r} does not stand exactly once in {bug.function}: {bug.what}")
    start, stop, body = places[0]
    return "".join([*lines[: start - 1], body.replace(bug.old, bug.new), *lines[stop:]])


def copy_tree(target: Path) -> None:
    """Copy what a test run reads."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def run_test(test: str, root: Path) -> tuple[str, str]:
    """Return what became of a test, `passed`, `failed` or else, and the line in which it says what is wrong."""
    code, text = fork_pytest(["-x", "-q", test], root, LIMIT_SECONDS)
    said = re.findall(r"^E\s+(\S.*)", text, flags=re.M)
    if code == "1":
        return "failed", said[0] if said else ""
    return ("passed", "") if code == "0" else (code if code == "too slow" else "DID NOT RUN", text[-1500:])


def fork_pytest(words: list[str], root: Path, limit_seconds: float) -> tuple[str, str]:
    """Run pytest on the copy in a fork, which finds torch and transformers imported.

    Returns:
        Its exit code, or "too slow", and what it printed.
    """
    imported = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # plugins of our libraries
    usual = [*imported, "-n0", "--no-header", "-p", "no:cacheprovider", f"--rootdir={root}"]
    shown = root / "shown.txt"
    child = os.fork()
    if child == 0:
        _become_pytest([*usual, *words], root, shown)
    deadline = time.monotonic() + limit_seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "too slow", ""
        time.sleep(0.05)
    text = shown.read_text(encoding="utf-8")
    return text.rsplit("exit code ", 1)[-1], text


def judge(bug: Bug, root: Path, healthy: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return the verdict on a bug, and what the test says; `healthy` keeps what tests say without any bug."""
    if bug.test not in healthy:
        healthy[bug.test] = run_test(bug.test, root)
    if healthy[bug.test][0] != "passed":
        return "FAILS ANYHOW", healthy[bug.test][1]
    path = root / bug.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutate(bug, root), encoding="utf-8")
    became, said = run_test(bug.test, root)
    path.write_text(text, encoding="utf-8")
    return {"failed": "caught", "passed": "SURVIVED"}.get(became, became), said


def _become_pytest(words: list[str], root: Path, shown: Path) -> NoReturn:
    """Run pytest in this forked process on the copy: whatever was imported of the repository itself is forgotten."""
    os.setpgid(0, 0)
    os.chdir(root)
    for name in list(sys.modules):
        if name.split(".")[0] in ("tests", "trainer"):
            del sys.modules[name]
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    target = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    code = -1
    try:
        code = int(pytest.main(words))
    except BaseException:  # noqa: BLE001  a fork must not go on in the code of its parent
        traceback.print_exc(file=sys.stdout)
    finally:
        print(f"exit code {code}", end="", flush=True)
        os._exit(0)


def import_heavy_libraries() -> None:
    """Import once what takes seconds in every test process, with one thread: the tests' models are tiny."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "pyarrow"):
        importlib.import_module(name)


def main() -> None:
    """Run them all, or those whose description holds a word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [bug for bug in BUGS if options.only in bug.what]
    if options.list:
        print("\n".join(f"{bug.law:30} {bug.what}" for bug in chosen))
        return
    num_missed = 0
    import_heavy_libraries()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tree(root)
        healthy: dict[str, tuple[str, str]] = {}
        for bug in chosen:
            started = time.monotonic()
            verdict, said = judge(bug, root, healthy)
            num_missed += verdict != "caught"
            seconds = time.monotonic() - started
            print(f"{verdict:12} {seconds:5.1f} s  {bug.law:24} {bug.what}: {said[-1500:]}", flush=True)
    print(f"{len(chosen) - num_missed} of {len(chosen)} bugs caught")
    raise SystemExit(num_missed > 0)


if __name__ == "__main__":
    main()
