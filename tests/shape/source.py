"""Reads the package as text and syntax trees, for the tests about the code."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "trainer"


def of_each(things: Collection[T]) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Make a check of one thing a test of them all, which says which ones fail: one item instead of hundreds."""

    def decorate(check: Callable[[T], None]) -> Callable[[], None]:
        def test() -> None:
            faults = {}
            for thing in things:
                try:
                    check(thing)
                except (AssertionError, pytest.fail.Exception) as error:
                    faults[str(thing)] = str(error)
            assert things, "there is nothing to check"
            assert not faults, "\n".join(f"{thing}: {fault}" for thing, fault in faults.items())

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def modules() -> list[Path]:
    """Every module of the package, relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))


@cache
def tree(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def name_of(module: Path) -> str:
    """trainer/data/store.py -> trainer.data.store"""
    parts = module.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: Path, *, at_import_time_only: bool = False) -> set[str]:
    """Names of the modules that a module imports, TYPE_CHECKING blocks aside."""
    found: set[str] = set()
    for node in _walk(tree(module), at_import_time_only):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def functions(module: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _walk(node: ast.AST, at_import_time_only: bool) -> Iterator[ast.AST]:
    yield node
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    if at_import_time_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, at_import_time_only)
