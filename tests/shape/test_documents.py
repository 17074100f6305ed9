"""The documents speak of what is there: names in docs/dataflow.md exist, commands of the README are understood."""

import re
import shlex
from pathlib import Path

import pytest

from tests.shape.source import ROOT, modules, tree

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("decisions/*.md")])


def names_in_the_package() -> set[str]:
    import ast

    found: set[str] = set()
    for module in modules():
        found |= {module.name, str(module), str(module.parent)}
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def test_every_name_in_the_data_flow_exists() -> None:
    text = (ROOT / "docs" / "dataflow.md").read_text(encoding="utf-8")
    known = names_in_the_package() | {"metrics.jsonl", "trainer plan"}
    for quoted in re.findall(r"`([^`]+)`", text):
        for part in re.split(r"\.(?!py)", quoted.partition("(")[0]):
            assert quoted in known or part in known, quoted


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
