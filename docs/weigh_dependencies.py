"""Weigh what each dependency and each extra brings: `python docs/weigh_dependencies.py`, for docs/install.md.

Measures what is installed where it runs, so every extra must be: pip install '.[all,test,docs,research-optimizers]'.
For an extra, only what the package itself does not bring counts.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = "reference-trainer"


@cache
def weigh(name: str) -> float:
    """Return the megabytes of an installed distribution."""
    files = [Path(str(file.locate())) for file in distribution(name).files or ()]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


@cache
def needed(name: str, extra: str = "") -> frozenset[str]:
    """Return the names of all that a distribution needs, or that one of its extras adds; not its own."""
    found: set[str] = set()
    for requirement in map(Requirement, distribution(name).requires or ()):
        of_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if of_extra != bool(extra) or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        other = requirement.name.lower().replace("_", "-")
        if other != PROJECT:
            found |= {other} | needed(other).union(*(needed(other, each) for each in requirement.extras))
    return frozenset(found)


def main() -> None:
    """Print the two tables."""
    core = needed(PROJECT)
    print("| package | itself | with all that it brings |\n|---|---|---|")
    for requirement in map(Requirement, distribution(PROJECT).requires or ()):
        if requirement.marker is None:
            whole = sum(map(weigh, {requirement.name} | needed(requirement.name)))
            print(f"| `{requirement.name}` | {weigh(requirement.name):.0f} MB | {whole:.0f} MB |")
    print(f"\n{len(core)} packages, {sum(map(weigh, core)):.0f} MB\n\n| extra | packages | weight |\n|---|---|---|")
    for extra in distribution(PROJECT).metadata.get_all("Provides-Extra") or ():
        added = needed(PROJECT, extra) - core
        print(f"| `{extra}` | {len(added)}: {', '.join(sorted(added))} | {sum(map(weigh, added)):.0f} MB |")


if __name__ == "__main__":
    main()
