"""Small files, short functions, few parameters, a docstring on top: what keeps the house readable."""

import ast
import statistics
from pathlib import Path

from tests.shape.source import ROOT, functions, modules, of_each, tree

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 12
MAX_LONG_SHARE = 0.15  # of all lines, in functions longer than LONG_FUNCTION_LINES
LONG_FUNCTION_LINES = 50
MAX_PARAMETERS = 6
FIXED_BY_THE_MISSION = {  # signatures that users of other systems bring along
    "get_data_loader",
    "Trainer.__init__",
}


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def named_functions(module: Path) -> list[tuple[str, ast.FunctionDef]]:
    found = [(node.name, node) for node in functions(module)]
    for owner in ast.walk(tree(module)):
        if isinstance(owner, ast.ClassDef):
            found += [(f"{owner.name}.{node.name}", node) for node in owner.body if isinstance(node, ast.FunctionDef)]
    return found


@of_each(modules())
def test_a_file_fits_in_the_head(module: Path) -> None:
    assert len((ROOT / module).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@of_each(modules())
def test_a_function_fits_on_a_screen(module: Path) -> None:
    assert {node.name: lines_of(node) for node in functions(module) if lines_of(node) > MAX_FUNCTION_LINES} == {}


def test_the_usual_function_is_short() -> None:
    lengths = [lines_of(node) for module in modules() for node in functions(module)]
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES
    total = sum(len((ROOT / module).read_text(encoding="utf-8").splitlines()) for module in modules())
    assert sum(length for length in lengths if length > LONG_FUNCTION_LINES) / total < MAX_LONG_SHARE


@of_each(modules())
def test_a_function_takes_few_parameters(module: Path) -> None:
    exempt = {name.split(".")[-1] for name in FIXED_BY_THE_MISSION if "." not in name}
    for name, node in named_functions(module):
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([argument for argument in arguments if argument not in ("self", "cls")])
        if name not in FIXED_BY_THE_MISSION and name not in exempt and name != "__init__":
            assert count <= MAX_PARAMETERS, f"{module}: {name} takes {count}"


@of_each(modules())
def test_a_module_says_what_it_owns(module: Path) -> None:
    assert ast.get_docstring(tree(module))


@of_each(modules())
def test_nothing_is_put_off_or_named_after_nothing(module: Path) -> None:
    text = (ROOT / module).read_text(encoding="utf-8")
    assert not any(word in text for word in ("TODO", "FIXME", "XXX"))
    assert module.stem not in ("utils", "helpers", "helper", "common", "misc", "manager")
