"""Each declared bug can be applied to the code as it is, and names a test that exists."""

import ast
from pathlib import Path

import pytest

from tests.mutants.bugs import BUGS, Bug
from tests.mutants.run import mutate
from tests.mutation import EQUIVALENT, ROOMS, all_mutants, candidate_tests, files_of
from tests.shape.source import ROOT, of_each

MIN_BUGS = 30
MIN_MUTANTS = 10


@of_each(BUGS)
def test_a_bug_changes_the_code_that_it_names(bug: Bug) -> None:
    assert ast.dump(ast.parse(mutate(bug, ROOT))) != ast.dump(ast.parse((ROOT / bug.file).read_text(encoding="utf-8")))


@of_each(BUGS)
def test_a_bug_names_a_test_that_exists(bug: Bug) -> None:
    file, *names = bug.test.split("::")
    nodes: list[ast.AST] = [ast.parse((ROOT / file).read_text(encoding="utf-8"))]
    for name in names:
        nodes = [node for owner in nodes for node in ast.iter_child_nodes(owner) if getattr(node, "name", "") == name]
        assert nodes, f"{file} has no {name}"


def test_mutants_are_many_and_have_names_of_their_own() -> None:
    assert len(BUGS) >= MIN_BUGS
    assert len({bug.what for bug in BUGS}) == len(BUGS)


def test_an_edit_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def f():\n    return 1\n\n\ndef g():\n    return 1\n")
    fits = Bug("w", "L1", "module.py", "f", "return 1", "return 2", "t")
    assert mutate(fits, tmp_path) == "def f():\n    return 2\n\n\ndef g():\n    return 1\n"
    for function, old in (("f", "return 3"), ("h", "return 1")):
        with pytest.raises(ValueError, match="exactly once"):
            mutate(Bug("w", "L1", "module.py", function, old, "return 2", "t"), tmp_path)


def test_the_table_in_the_documents_has_every_bug() -> None:
    text = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")
    for bug in BUGS:
        assert f"| {bug.law} | {bug.what} | `{bug.test.split('::')[-1]}` |" in text
    assert sum(line.startswith("| L") for line in text.partition("## Known bugs")[2].splitlines()) == len(BUGS)


@pytest.mark.parametrize("file", ["trainer/training/step.py", "trainer/data/order.py"])
def test_a_core_file_has_mutants_that_change_it(file: str) -> None:
    healthy = ast.unparse(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    mutants = all_mutants(file)
    assert len({mutant.text for mutant in mutants}) > MIN_MUTANTS
    assert healthy not in {mutant.text for mutant in mutants}


def test_an_equivalent_mutant_is_one_of_the_code_as_it_is() -> None:
    for file, change in EQUIVALENT:
        assert change in {mutant.change for mutant in all_mutants(file)}, "no longer there: take it out"


def test_each_room_has_files_and_tests() -> None:
    for room in ROOMS:
        assert files_of(room)
        assert [test for test in candidate_tests(room) if not (ROOT / test).is_file()] == []
