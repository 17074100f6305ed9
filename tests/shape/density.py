"""Counts how dense the code of a folder is: what a reader meets in a thousand lines.

python -m tests.shape.density [FOLDER]
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Density:
    """Per thousand lines, but `single_use`: the percentage of functions that are private and used once."""

    any_annotations: float
    comprehensions: float
    conditional_expressions: float
    single_use: float


def measure_density(folder: Path) -> Density:
    """Count over all modules below a folder."""
    num_lines = num_functions = 0
    counts: Counter[str] = Counter()
    private: Counter[str] = Counter()  # name -> definitions
    uses: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        num_lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_functions += 1
                if node.name.startswith("_") and not node.name.startswith("__"):
                    private[node.name] += 1
            elif isinstance(node, COMPREHENSIONS):
                counts["comprehensions"] += 1
            elif isinstance(node, ast.IfExp):
                counts["conditional_expressions"] += 1
            elif isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                uses[name] += 1
                counts["any_annotations"] += name == "Any"
    per_thousand = {name: 1000 * counts[name] / max(num_lines, 1) for name in Density.__annotations__}
    once = [name for name, defined in private.items() if defined == 1 and uses[name] == 1]
    return Density(**{**per_thousand, "single_use": 100 * len(once) / max(num_functions, 1)})


if __name__ == "__main__":
    print(measure_density(Path(sys.argv[1] if len(sys.argv) > 1 else "trainer")))
