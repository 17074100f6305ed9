"""Prove that the suite notices: apply each bug of bugs.py to a copy of the repository and run the test that must fail.

    python -m tests.mutants.run [--only WORD] [--list]

Exit code 1 if a bug passes its test, if a test cannot run, or if one takes longer than the limit.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 300  # a busy machine takes many times what an idle one does
COPIED = ("trainer", "tests", "examples", "benchmarks", "pyproject.toml", "setup.py", "conftest.py", "README.md")


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


def run_test(bug: Bug, root: Path) -> tuple[str, str]:
    """Return the verdict on a bug, and the line in which the failing test says what is wrong."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "--no-header", "-p", "no:cacheprovider", bug.test]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "too slow", ""
    said = re.findall(r"^E\s+(\S.*)", done.stdout, flags=re.M)
    if done.returncode == 1:
        return "caught", said[0] if said else ""
    if done.returncode == 0:
        return "SURVIVED", ""
    return "DID NOT RUN", (done.stdout + done.stderr)[-300:]


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
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tree(root)
        for bug in chosen:
            path = root / bug.file
            healthy = path.read_text(encoding="utf-8")
            started = time.monotonic()
            path.write_text(mutate(bug, root), encoding="utf-8")
            verdict, said = run_test(bug, root)
            path.write_text(healthy, encoding="utf-8")
            num_missed += verdict != "caught"
            print(
                f"{verdict:11} {time.monotonic() - started:5.1f} s  {bug.law:24} {bug.what}: {said[:100]}", flush=True
            )
    print(f"{len(chosen) - num_missed} of {len(chosen)} bugs caught")
    raise SystemExit(num_missed > 0)


if __name__ == "__main__":
    main()
