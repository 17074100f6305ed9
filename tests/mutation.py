"""Random mutants of core files: how many would the suite notice?

    python -m tests.mutation [--files WORD ...] [--per-file N] [--seed N] [--report FILE]

Which tests cover a function is measured first, once; a mutant is then met by those of its own function, quickest first,
in a fork of a process that has torch and transformers imported. Survivors are listed with file, line and change.
EQUIVALENT records those that change nothing that anyone could see, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.run import ROOT, copy_tree, fork_pytest, import_heavy_libraries

# Core file -> the tests that are asked first whether they cover its functions.
CORE = {
    "trainer/training/step.py": ("tests/test_training_components.py", "tests/laws/test_accounting.py"),
    "trainer/training/loop.py": ("tests/test_training_loop.py", "tests/laws/test_resume.py"),
    "trainer/training/metrics.py": ("tests/test_training_components.py", "tests/laws/test_accounting.py"),
    "trainer/optim/gradients.py": ("tests/test_training_components.py", "tests/trainer/test_trainer_precision.py"),
    "trainer/data/order.py": ("tests/test_data_loader.py", "tests/laws/test_conservation.py"),
    "trainer/data/packing.py": ("tests/test_batch_lengths_to_minibatches.py",),
    "trainer/data/loader.py": ("tests/test_data_loader.py", "tests/laws/test_layout_invariance.py"),
    "trainer/data/length.py": ("tests/test_training_loop.py", "tests/trainer/test_trainer.py", "tests/test_mixture.py"),
}
# (file, change) -> why no test could tell
EQUIVALENT: dict[tuple[str, str], str] = {}
LIMIT_SECONDS = 60.0  # of one mutant
COVERAGE_SECONDS = 1800.0
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARISONS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    """One change of one function."""

    file: str
    function: str
    line: int
    change: str
    text: str  # of the whole file


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node could be by mistake."""
    changed = copy.copy(node)
    if isinstance(changed, ast.Compare) and type(changed.ops[0]) in COMPARISONS:
        changed.ops = [COMPARISONS[type(changed.ops[0])](), *changed.ops[1:]]
        yield changed
    elif isinstance(changed, ast.BinOp) and type(changed.op) in OPERATORS:
        changed.op = OPERATORS[type(changed.op)]()
        yield changed
    elif isinstance(changed, ast.BoolOp):
        changed.op = ast.Or() if isinstance(changed.op, ast.And) else ast.And()
        yield changed
    elif isinstance(changed, ast.Constant) and type(changed.value) in (bool, int, float):
        changed.value = not changed.value if isinstance(changed.value, bool) else changed.value + 1
        yield changed
    elif isinstance(changed, ast.If | ast.While | ast.IfExp):
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
        yield changed
    elif isinstance(changed, ast.UnaryOp) and isinstance(changed.op, ast.Not | ast.USub):
        yield changed.operand
    elif isinstance(changed, ast.Expr) and isinstance(changed.value, ast.Call):
        yield ast.Pass()
    elif isinstance(changed, ast.Return) and not (changed.value is None or ast.unparse(changed.value) == "None"):
        changed.value = ast.Constant(None)
        yield changed


def all_mutants(file: str) -> list[Mutant]:
    """Return every mutant of a file's functions; docstrings, annotations, messages and defaults are left alone."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for owner in _code_of(function):
            for name, old, index in _children(owner):
                for new in changes(old):
                    shown = (
                        f"{ast.unparse(old)} -> {ast.unparse(ast.fix_missing_locations(ast.copy_location(new, old)))}"
                    )
                    _put(owner, name, index, new)
                    mutated = ast.unparse(ast.fix_missing_locations(tree))
                    _put(owner, name, index, old)
                    line = getattr(old, "lineno", function.lineno)
                    found.append(Mutant(file, function.name, line, " ".join(shown.split())[:160], mutated))
    return found


def _code_of(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield nodes of a function's body outside of functions within it, raised errors and log calls."""
    waiting: list[ast.AST] = [function]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            is_told = isinstance(child, ast.Raise | ast.Assert | ast.FunctionDef | ast.JoinedStr | ast.arguments)
            if not is_told and not ast.unparse(child).startswith("_log."):
                waiting.append(child)


def _children(owner: ast.AST) -> Iterator[tuple[str, ast.AST, int | None]]:
    for name, value in ast.iter_fields(owner):
        if name in ("returns", "annotation", "decorator_list", "args"):
            continue
        if isinstance(value, ast.AST):
            yield name, value, None
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, ast.AST) and not isinstance(item, ast.FunctionDef):
                    yield name, item, index


def _put(owner: ast.AST, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(owner, name, node)
    else:
        getattr(owner, name)[index] = node


def measure_coverage(root: Path, files: list[str]) -> dict[str, list[str]]:
    """Return the tests that enter each function, quickest first; those that fail anyhow are left out."""
    (root / "files.json").write_text(json.dumps(files))
    os.environ["COVERED"] = str(root / "covered.json")
    tests = sorted({test for file in files for test in CORE[file]})
    code, text = fork_pytest(["-q", "-p", "tests.mutation_coverage", *tests], root, COVERAGE_SECONDS)
    if not (root / "covered.json").exists():
        raise SystemExit(f"measuring coverage ended with {code}: {text[-1500:]}")
    found: dict[str, list[str]] = json.loads((root / "covered.json").read_text())
    return found


def meet(mutant: Mutant, covering: dict[str, list[str]], root: Path, most: int) -> str:
    """Return what became of a mutant: killed, survived, or not covered by any test."""
    tests = covering.get(f"{mutant.file}::{mutant.function}", [])
    if not tests:
        return "not covered"
    path = root / mutant.file
    healthy = path.read_text(encoding="utf-8")
    path.write_text(mutant.text, encoding="utf-8")
    code, _ = fork_pytest(["-q", "-x", *_spread(tests, most)], root, LIMIT_SECONDS)
    path.write_text(healthy, encoding="utf-8")
    return "survived" if code == "0" else "killed"


def _spread(tests: list[str], most: int) -> list[str]:
    """Return so many of the quickest tests, no function of a parametrised test more than three times."""
    taken: dict[str, int] = {}
    chosen = []
    for test in tests:
        name = test.partition("[")[0]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] <= 3:
            chosen.append(test)
    return chosen[:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", default=[""], metavar="WORD", help="core files whose names hold a word")
    parser.add_argument("--per-file", type=int, default=10, metavar="N", help="mutants of each file")
    parser.add_argument("--most-tests", type=int, default=40, metavar="N", help="tests that a mutant meets, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write scores and survivors to this file as JSON")
    options = parser.parse_args()
    files = [file for file in CORE if any(word in file for word in options.files)]
    score: dict[str, dict[str, int]] = {}
    survivors = []
    import_heavy_libraries()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        copy_tree(root)
        covering = measure_coverage(root, files)
        for file in files:
            mutants = all_mutants(file)
            random.Random(f"{options.seed} {file}").shuffle(mutants)
            for mutant in mutants[: options.per_file]:
                started = time.monotonic()
                verdict = meet(mutant, covering, root, options.most_tests)
                if verdict != "killed" and (file, mutant.change) in EQUIVALENT:
                    verdict = "equivalent"
                room = score.setdefault(file, {})
                room[verdict] = room.get(verdict, 0) + 1
                seconds = time.monotonic() - started
                print(
                    f"{verdict:11} {seconds:5.1f} s  {file}:{mutant.line} {mutant.function}: {mutant.change}",
                    flush=True,
                )
                if verdict in ("survived", "not covered"):
                    survivors.append({"file": file, "line": mutant.line, "change": mutant.change, "verdict": verdict})
    for file, counts in score.items():
        total = sum(counts.values()) - counts.get("equivalent", 0)
        print(f"{file:36} {counts.get('killed', 0)} of {total} killed")
    if options.report is not None:
        options.report.write_text(json.dumps({"score": score, "survivors": survivors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
