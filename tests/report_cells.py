"""Reads JUnit reports of several machines and names the (back end, world size) cells that ran on none of them.

python tests/report_cells.py FOLDER    every *.xml below it; fails only when there is no report
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

CELL = re.compile(r"[\[-](fake|threads|gloo|nccl)-(\d+)(?=[\]-])")


def main(words: Sequence[str]) -> int:
    """Print the cells, as lines of Markdown."""
    reports = sorted(path for word in words for path in Path(word).rglob("*.xml"))
    if not reports:
        print(f"no *.xml below {', '.join(words) or 'nothing'}: name the folder of the reports", file=sys.stderr)
        return 1
    ran, asked = count_cells(reports)
    print("| back end | ranks | tests run | asked for |\n|---|---|---|---|")
    for backend, size in sorted(asked):
        print(f"| {backend} | {size} | {ran[backend, size]} | {asked[backend, size]} |")
    missing = [f"{backend}-{size}" for backend, size in sorted(asked) if not ran[backend, size]]
    print(f"\nran nowhere: {', '.join(missing) or 'none'}")
    return 0


def count_cells(reports: Iterable[Path]) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """(cell -> different tests that ran somewhere, cell -> different tests that asked for it)."""
    asked: dict[tuple[str, str], tuple[str, int]] = {}
    ran: set[tuple[str, str]] = set()
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            test = (case.get("classname", ""), case.get("name", ""))
            if (found := CELL.search(test[1])) is None:
                continue
            asked[test] = (found[1], int(found[2]))
            if case.find("skipped") is None:
                ran.add(test)
    return Counter(asked[test] for test in ran), Counter(asked.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
