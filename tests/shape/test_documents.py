"""The documents speak of what is there: names in docs/architecture.md exist, commands of the README are understood."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from tests.run_tests import LANES
from tests.shape.source import PACKAGE, ROOT, tree
from tests.shape.test_imports import FLOORS

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("decisions/*.md")])


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def definitions(module: Path) -> set[str]:
    """Names of the classes and functions of a module, methods included."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree(module)) if isinstance(node, kinds)}


def test_names_in_the_architecture_are_where_it_says() -> None:
    named = re.findall(r"`([A-Za-z_]+)`\s+\(`([a-z_/]+\.py)`\)", ARCHITECTURE)
    assert len(named) > 30
    wrong = []
    for name, file in named:
        module = Path("trainer", file)
        if not (ROOT / module).exists() or name not in definitions(module):
            wrong.append(f"{name} ({file})")
    assert wrong == []


def test_files_in_the_architecture_exist() -> None:
    files = re.findall(r"`([a-z_/]+\.py)`", ARCHITECTURE)
    assert [file for file in files if not (PACKAGE / file).exists()] == []


def test_the_architecture_has_every_room_in_the_order_of_imports() -> None:
    rooms = re.findall(r"^\| `([a-z]+)/` \|", ARCHITECTURE, flags=re.M)
    assert set(rooms) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert [FLOORS[room] for room in rooms] == sorted(FLOORS[room] for room in rooms)


def test_files_and_environments_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:trainer|tests|benchmarks|docs|decisions|\.ci)/[\w./-]*)`", text)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    listed = set(re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| (`.*?`) \|", text, flags=re.M))))
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    declared: set[str] = set()
    for names in re.findall(r"^\[testenv:\{?([\w,-]+)\}?\]", tox, flags=re.M):
        declared |= set(names.split(","))
    assert listed - {"test"} == declared


def test_what_has_run_where_names_every_lane_and_the_pinned_versions() -> None:
    """Who raises a pin has to run the lanes again, or say that they did not run since."""
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    section = text.partition("## What has run where")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {*LANES, "learns", "mutants", "lowest", "newest", "templates"}
    for *_, versions, when in rows:
        lowest = "torch 2.11" in versions
        constraints = (ROOT / ("constraints-lowest.txt" if lowest else "constraints.txt")).read_text(encoding="utf-8")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d|not yet.*", when), when
        for package, version in re.findall(r"(torch|transformers) ([\d.]+\d)", versions):
            assert f"{package}=={version}" in constraints, f"{package} {version} is not what is pinned"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("trainer ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.cli.main import main

    assert main([*shlex.split(command)[1:], "--no-such-option"]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1, "the unknown option is all that is wrong"
    assert "--no-such-option" in refused


def test_the_readme_has_the_two_commands() -> None:
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "trainer train examples/quickstart.yaml" in lines[0]
    assert "tests/run_tests.py" in lines[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_changelog_has_unreleased_changes_on_top() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert headings[0] == "Unreleased"
