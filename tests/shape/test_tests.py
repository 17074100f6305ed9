"""The suite about itself: tolerances have names, fixtures are short, tests can fail, nothing is mocked."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.shape.source import ROOT, functions, imports, of_each, tree

MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
TEST_MODULES = [module for module in MODULES if module.name.startswith("test_")]
TOLERANCES = {"rel", "abs", "rtol", "atol"}
MAX_FIXTURE_LINES = 10
JUDGES = ("assert", "check", "raises", "warns")  # calls whose names begin like this can fail


def calls(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(last part of its name, call) of all calls below a node."""
    for found in ast.walk(node):
        if isinstance(found, ast.Call):
            yield ast.unparse(found.func).rsplit(".", 1)[-1], found


@of_each(TEST_MODULES)
def test_a_tolerance_has_a_name(module: Path) -> None:
    for name, call in calls(tree(module)):
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg in TOLERANCES}
        literal = [value for value in given.values() if isinstance(value, ast.Constant) and value.value != 0]
        assert not literal, f"{module}:{call.lineno} has a literal tolerance: name it in tests/fixtures/tolerances.py"
        assert name != "approx" or given, f"{module}:{call.lineno}: approx has a tolerance of its own: name one"


@of_each(MODULES)
def test_a_fixture_is_short(module: Path) -> None:
    fixtures = [
        node
        for node in functions(module)
        if any(ast.unparse(d).partition("(")[0].endswith("fixture") for d in node.decorator_list)
    ]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in fixtures if node.end_lineno is not None}
    assert {name: n for name, n in lengths.items() if n > MAX_FIXTURE_LINES} == {}, "a builder is missing"


@of_each(TEST_MODULES)
def test_a_test_can_fail(module: Path) -> None:
    tests = [node for node in functions(module) if node.name.startswith("test_")]
    toothless = [
        node.name
        for node in tests
        if not any(isinstance(found, ast.Assert) for found in ast.walk(node))
        and not any(name.startswith(JUDGES) or "check=True" in ast.unparse(call) for name, call in calls(node))
    ]
    assert toothless == []


@of_each(MODULES)
def test_nothing_is_mocked(module: Path) -> None:
    assert not any(name.startswith(("unittest.mock", "mock", "pytest_mock")) for name in imports(module))
    assert not any("mocker" in [a.arg for a in node.args.args] for node in functions(module))
