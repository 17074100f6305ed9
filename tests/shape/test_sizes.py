"""Sizes of files and functions, a docstring on top of each module, and nothing put off."""

import ast
from pathlib import Path

from tests.shape.source import ROOT, functions, modules, of_each, tree

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@of_each(modules())
def test_a_file_is_not_too_long(module: Path) -> None:
    assert len((ROOT / module).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@of_each(modules())
def test_a_function_is_not_too_long(module: Path) -> None:
    assert {node.name: lines_of(node) for node in functions(module) if lines_of(node) > MAX_FUNCTION_LINES} == {}


@of_each(modules())
def test_a_module_says_what_it_owns(module: Path) -> None:
    assert ast.get_docstring(tree(module))


@of_each(modules())
def test_a_module_puts_nothing_off_and_is_named_after_its_content(module: Path) -> None:
    text = (ROOT / module).read_text(encoding="utf-8")
    assert not any(word in text for word in ("TODO", "FIXME", "XXX"))
    assert module.stem not in ("utils", "helpers", "helper", "common", "misc", "manager")
