"""How much a reader has to open, and how dense what he finds is: no more than reached so far, on the way to a goal."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.shape.density import measure_density
from tests.shape.source import PACKAGE, ROOT

# measure -> (reached, goal); lower a number that was reached as soon as the code allows it
DENSITY = {
    "any_annotations": (31.5, 12),  # per 1,000 lines, as the next two
    "comprehensions": (33.5, 20),
    "conditional_expressions": (20.5, 12),
    "single_use": (14.5, 10),  # private functions used once, percent of all functions
}
FUNCTIONS = {"build": (515, 220), "step": (113, 70), "save": (88, 50), "restore": (60, 45)}
FILES = {"build": (75, 40), "step": (25, 16), "save": (23, 12), "restore": (14, 12)}


def test_the_code_is_no_denser_than_it_was() -> None:
    found = asdict(measure_density(PACKAGE))
    assert found.keys() == DENSITY.keys()
    assert {name: value for name, value in found.items() if value > DENSITY[name][0]} == {}


def test_a_run_enters_no_more_functions_and_files_than_it_did() -> None:
    """In a process of its own, where imports and caches are as in a user's run."""
    command = [sys.executable, "-m", "tests.shape.trips"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trips = json.loads(done.stdout.splitlines()[-1])
    assert trips.keys() == FUNCTIONS.keys()
    for part, (functions, files) in trips.items():
        assert functions > 10, f"{part}: nearly nothing was counted"
        assert functions <= FUNCTIONS[part][0], f"{part} enters {functions} functions"
        assert files <= FILES[part][0], f"{part} enters {files} files"


@pytest.mark.parametrize(
    ("code", "measure", "count"),
    [
        ("x: Any = 1\ny: typing.Any = 2", "any_annotations", 2),
        ("a = [x for x in b]\nc = {x: 1 for x in b}", "comprehensions", 2),
        ("a = 1 if b else 2\nif a:\n    pass", "conditional_expressions", 1),
    ],
)
def test_density_counts_what_it_says(tmp_path: Path, code: str, measure: str, count: int) -> None:
    (tmp_path / "module.py").write_text(f"{code}\n")
    num_lines = code.count("\n") + 1
    assert asdict(measure_density(tmp_path))[measure] == 1000 * count / num_lines


def test_density_finds_private_functions_that_are_used_once(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def _once(): ...\ndef _twice(): ...\n_once()\n_twice()\n_twice()\n")
    assert measure_density(tmp_path).single_use == 50
