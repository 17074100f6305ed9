"""pip, uv, hooks and actions take the versions that are pinned; decisions are numbered."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.shape.source import ROOT
from trainer.cli.doctor import OPTIONAL
from trainer.config.choices import TRACKERS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
NEEDED_BY_UV = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def normal(requirement: str) -> str:
    """Return a pinned requirement in the spelling of package indexes."""
    return requirement.strip().lower().replace("_", "-")


def pinned(file: str = "constraints.txt") -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_uv_is_given_the_pins_of_pip() -> None:
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == pinned()


def test_the_lowest_versions_are_those_that_the_package_admits() -> None:
    """A requirement without a lower bound would admit versions that nobody has tried."""
    bounds = [normal(requirement).partition(",")[0] for requirement in PROJECT["project"]["dependencies"]]
    pins = [tuple(normal(pin).split("==")) for pin in pinned("constraints-lowest.txt")]
    assert len(bounds) == len(pins)
    for name, version in pins:
        admitted = [version.removesuffix(".0" * zeros) for zeros in range(3)]
        assert any(f"{name}>={number}" in bounds for number in admitted), f"{name}=={version}: {sorted(bounds)}"


def test_uv_run_installs_the_tests_requirements() -> None:
    assert PROJECT["dependency-groups"]["dev"] == [f"{PROJECT['project']['name']}[test]"]


def test_every_extra_that_is_named_is_there() -> None:
    """Error messages, documents and tests tell users what to install."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("trainer/**/*.py")]
    named: dict[str, str] = {}
    for file in files:
        for extras in re.findall(r"reference-trainer\\?\[([a-z,-]+)\\?\]", file.read_text(encoding="utf-8")):
            named.update(dict.fromkeys(extras.split(","), str(file)))
    advised = {"optimizers", "research-optimizers", *TRACKERS, *(extra for _, extra in OPTIONAL.values())}
    assert {"report", "search", "all"} <= named.keys()
    assert (named.keys() | advised) - EXTRAS.keys() == set(), named


def test_all_brings_what_users_may_want_and_are_free_to_use() -> None:
    (whole,) = EXTRAS["all"]
    brought = set(whole.partition("[")[2].rstrip("]").split(","))
    assert brought == EXTRAS.keys() - {"all", "test", "docs", "research-optimizers"}


def test_the_tables_of_dependencies_name_each() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"), flags=re.M)
    needed = [re.split(r"[<>=]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]]
    assert listed == [*needed, *(extra for extra in EXTRAS if extra != "all")]


def test_uv_resolves_the_pinned_versions(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed: pip install uv")
    for name in NEEDED_BY_UV:
        shutil.copy(ROOT / name, tmp_path)
    command = [uv, "export", "--offline", "--no-hashes", "--no-annotate", "--no-emit-project"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "network was disabled" in done.stderr or "not found in the cache" in done.stderr:
        pytest.skip("uv has no cached metadata to resolve from: run `uv export` once")
    assert done.returncode == 0, done.stderr
    resolved = {normal(line.partition(";")[0]) for line in done.stdout.splitlines() if "==" in line}
    names = {line.partition("==")[0] for line in resolved}
    pins = {normal(pin) for pin in pinned()}
    expected = {pin for pin in pins if pin.partition("==")[0] in names}
    assert {"pytest", "torch", "transformers", "hypothesis"} <= names
    assert expected <= resolved, f"not as pinned: {sorted(expected - resolved)}"


def test_hooks_before_a_commit_have_the_pinned_versions() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hooked = set(re.findall(r"additional_dependencies: \[(.+?)\]", text))
    assert hooked
    assert hooked <= set(pinned())


def test_actions_are_pinned_by_hash() -> None:
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        used = re.findall(r"uses: (\S+)", workflow.read_text(encoding="utf-8"))
        assert used
        assert [action for action in used if not re.search(r"@[0-9a-f]{40}$", action)] == []


def test_decisions_are_numbered_without_a_hole() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "decisions").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
