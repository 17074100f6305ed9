"""Random mutants of the core: how many would the suite notice?

    python -m tests.mutation [--rooms ROOM ...] [--files WORD ...] [--per-file N] [--seed N] [--report FILE]

Which tests run a line is measured first, once; a mutant is then met by those of its own line, quickest first, in a fork
of a process that has torch and transformers imported. Survivors are listed with file, line and change.
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
from tests.mutation_coverage import Covering, read

# Room of trainer/ -> the tests that may cover its functions; `laws/resume` is tests/laws/test_resume.py.
ROOMS = {
    "data": """
        batch_lengths_to_minibatches chat chat_templates composed_templates data_loader jsonl mixture prepare preview
        sources store training_loop laws/conservation laws/data_is_not_code laws/layout_invariance laws/nothing_silent
        laws/plan_is_pure trainer/trainer_data trainer/trainer_evaluation""",
    "training": """
        checkpoint_files checkpoint_records doctor evaluate generate hf/restarts jsonl lora memory mixture nonfinite
        osft_runs preview process_settings run_dir scores tasks trainer_inputs training_components training_loop
        laws/accounting laws/agreement laws/determinism laws/fidelity laws/frozen laws/layout_invariance
        laws/no_shared_state
        laws/nothing_silent laws/resume trainer/trainer trainer/trainer_callback trainer/trainer_checkpointing
        trainer/trainer_data trainer/trainer_evaluation trainer/trainer_models trainer/trainer_options
        trainer/trainer_precision trainer/trainer_reporting trainer/trainer_seq2seq""",
    "optim": """
        nonfinite optimizers osft osft_runs schedules training_components laws/accounting laws/frozen
        laws/layout_invariance trainer/trainer trainer/trainer_checkpointing trainer/trainer_optimizers
        trainer/trainer_precision""",
    "model": """
        attention blocks doctor gpu_path lora loss memory model_files model_initialization tasks laws/data_is_not_code
        laws/fidelity laws/frozen laws/isolation laws/layout_invariance trainer/trainer_models
        trainer/trainer_precision""",
    "checkpoint": """
        checkpoint_files checkpoint_records checkpoint_storage training_components laws/data_is_not_code laws/fidelity
        laws/resume trainer/trainer_checkpointing""",
    "distributed": """
        data_loader process_settings training_components laws/agreement laws/layout_invariance laws/no_shared_state
        system/faults system/processes system/torchrun trainer/trainer_data""",
    "config": """
        arguments command_line schedules laws/nothing_silent trainer/trainer_arguments trainer/trainer_options
        trainer/trainer_surface""",
}
# (file, change) -> why no test could tell
EQUIVALENT: dict[tuple[str, str], str] = {
    ("trainer/distributed/failure.py", "time.sleep(0.05) -> pass"): "it asks again at once, to the same deadline",
    ("trainer/distributed/launch.py", "failure.exitcode < 0 -> failure.exitcode <= 0"): "a failure never exits with 0",
    ("trainer/training/packed_task.py", "return [] -> return None"): "its callers ask only whether there are any",
}
LIMIT_SECONDS = 60.0  # of one mutant, beside four times what its tests took, so that one that hangs costs little
VERDICTS = ("killed", "too slow", "survived", "not covered", "equivalent")
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


def files_of(room: str) -> list[str]:
    """Return the files whose mutants are drawn."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "trainer" / room).glob("*.py"))]


def candidate_tests(room: str) -> list[str]:
    """Return the test files that may cover a room."""
    paths = [Path("tests") / word for word in ROOMS[room].split()]
    return [str(path.with_name(f"test_{path.name}.py")) for path in paths]


def measure_coverage(root: Path, room: str, files: list[str]) -> Covering:
    """Return the tests that run each line."""
    out = root / f"covered-{room}"
    out.mkdir()
    os.environ["COVERAGE_FILE"] = str(out / ".coverage")
    measured = ["--cov=trainer", "--cov-context=test", "--cov-report=", "-p", "tests.mutation_coverage"]
    code, text = fork_pytest(["-q", *measured, *candidate_tests(room)], root, COVERAGE_SECONDS)
    if code not in ("0", "1"):
        raise SystemExit(f"measuring coverage ended with {code}: {text[-1500:]}")
    print("\n".join(line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))), flush=True)
    return read(out, root, files)


def meet(mutant: Mutant, covering: Covering, root: Path, most_seconds: float) -> str:
    """Return what became of a mutant: killed, too slow (a hang, or a busy machine), survived, or not covered."""
    lines = covering[mutant.file]
    # What runs as the module is imported belongs to no test: then those of the file are asked.
    tests, seconds = _quickest(lines.get(mutant.line) or lines[0], most_seconds)
    if not tests:
        return "not covered"
    path = root / mutant.file
    healthy = path.read_text(encoding="utf-8")
    path.write_text(mutant.text, encoding="utf-8")
    code, _ = fork_pytest(["-q", "-x", *tests], root, LIMIT_SECONDS + 4 * seconds)
    path.write_text(healthy, encoding="utf-8")
    return {"0": "survived", "too slow": "too slow"}.get(code, "killed")


def _quickest(tests: list[tuple[float, str]], most_seconds: float) -> tuple[list[str], float]:
    """Return the quickest tests that fit in a time, and their seconds; three cases of each function come first."""
    taken: dict[str, int] = {}
    first: list[tuple[float, str]] = []
    later: list[tuple[float, str]] = []
    for seconds, test in tests:
        name = test.partition("[")[0]
        taken[name] = taken.get(name, 0) + 1
        (first if taken[name] <= 3 else later).append((seconds, test))
    chosen: list[str] = []
    total = 0.0
    for seconds, test in first + later:
        if not chosen or total + seconds <= most_seconds:
            chosen.append(test)
            total += seconds
    return chosen, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="*", default=list(ROOMS), choices=list(ROOMS), help="rooms of trainer/")
    parser.add_argument("--files", nargs="*", default=[""], metavar="WORD", help="files whose names hold a word")
    parser.add_argument("--per-file", type=int, default=10, metavar="N", help="mutants of each file")
    parser.add_argument("--most-seconds", type=float, default=60.0, metavar="S", help="of a mutant's tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write scores and survivors to this file as JSON")
    options = parser.parse_args()
    score: dict[str, dict[str, int]] = {}
    survivors = []
    import_heavy_libraries()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        copy_tree(root)
        for room in options.rooms:
            counts = score.setdefault(room, dict.fromkeys(VERDICTS, 0))
            files = [file for file in files_of(room) if any(word in file for word in options.files)]
            covering = measure_coverage(root, room, files)
            for mutant in draw(files, options.seed, options.per_file):
                started = time.monotonic()
                verdict = "equivalent"
                if (mutant.file, mutant.change) not in EQUIVALENT:
                    verdict = meet(mutant, covering, root, options.most_seconds)
                counts[verdict] += 1
                told = f"{mutant.file}:{mutant.line} {mutant.function}: {mutant.change}"
                print(f"{verdict:11} {time.monotonic() - started:5.1f} s  {told}", flush=True)
                if verdict in ("survived", "not covered"):
                    survivors.append(told)
                if options.report is not None:  # after each, so that nothing is lost of a run that is stopped
                    options.report.write_text(json.dumps({"score": score, "survivors": survivors}, indent=1) + "\n")
    for room, counts in score.items():
        total = sum(counts.values()) - counts["equivalent"]
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        print(f"{room:12} {counts['killed'] + counts['too slow']} of {total} noticed: {told}")


def draw(files: list[str], seed: int, per_file: int) -> Iterator[Mutant]:
    """Yield so many mutants of each file, the same for the same seed and code."""
    for file in files:
        mutants = all_mutants(file)
        random.Random(f"{seed} {file}").shuffle(mutants)
        yield from mutants[:per_file]


if __name__ == "__main__":
    main()
