"""Data, configurations and checkpoints are never executed (law L11): what could do it is not in the package."""

import ast
from pathlib import Path

from tests.shape.source import imports, modules, of_each, tree

UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "yaml.load", "eval", "exec", "np.load", "numpy.load"}


@of_each(modules())
def test_nothing_unpickles(module: Path) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & UNSAFE_MODULES


@of_each(modules())
def test_nothing_executes_what_it_reads(module: Path) -> None:
    called = {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
    assert not called & UNSAFE_CALLS
