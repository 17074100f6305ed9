"""Weigh what each dependency and each extra brings: `python docs/weigh_dependencies.py`, for docs/install.md.

pip resolves with constraints.txt; a weight is that of the unpacked wheels on this platform. For an extra, only what the
package itself does not bring counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pip(*words: str) -> str:
    """Run pip with the pinned versions and return what it prints."""
    command = [sys.executable, "-m", "pip", *words, "-c", str(ROOT / "constraints.txt")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def resolve(*requirements: str) -> dict[str, str]:
    """Return what pip would install for some requirements: name -> version."""
    words = ("install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-")
    report = json.loads(pip(*words, *requirements))
    packages = [item["metadata"] for item in report["install"]]
    return {package["name"].lower().replace("_", "-"): package["version"] for package in packages}


@cache
def weigh(name: str, version: str) -> int:
    """Return the bytes of an unpacked wheel."""
    with tempfile.TemporaryDirectory() as folder:
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, f"{name}=={version}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return sum(entry.file_size for entry in archive.infolist())


def main() -> None:
    """Print the two tables."""
    core = resolve(*PROJECT["dependencies"])
    print("| package | itself | with all it brings |\n|---|---|---|")
    for requirement in PROJECT["dependencies"]:
        name = requirement.partition(">")[0]
        own = weigh(name, core[name])
        whole = sum(weigh(*package) for package in resolve(requirement).items())
        print(f"| {name} | {own / 1e6:.1f} MB | {whole / 1e6:.0f} MB |", flush=True)
    print(f"\nall: {len(core)} packages, {sum(weigh(*package) for package in core.items()) / 1e6:.0f} MB\n")
    print("| extra | packages | weight |\n|---|---|---|")
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra == "all":
            continue
        added = {name: version for name, version in resolve(*core_and(requirements)).items() if name not in core}
        weight = sum(weigh(*package) for package in added.items())
        print(f"| {extra} | {len(added)}: {', '.join(sorted(added))} | {weight / 1e6:.0f} MB |", flush=True)


def core_and(requirements: list[str]) -> list[str]:
    """Return some requirements after those of the package itself."""
    return [*PROJECT["dependencies"], *requirements]


if __name__ == "__main__":
    main()
