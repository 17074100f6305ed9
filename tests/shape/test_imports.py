"""Imports run one way, and the borders of the house hold."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shape.source import imports, modules, name_of, of_each, tree

# A room may import rooms of a lower number, and its own modules.
FLOORS = {
    "errors": 0,
    "atomic": 1,
    "download": 1,
    "labels": 0,
    "host": 0,
    "config": 1,
    "data": 3,
    "distributed": 2,
    "model": 4,
    "optim": 4,
    "checkpoint": 5,
    "training": 6,
    "hf": 7,
    "cli": 7,
    "__main__": 9,
    "mini_trainer": 8,
    "train": 9,
}
# Inside functions alone: scripts ask their options for ranks.
LOOKS_UP = {"trainer/config/transformers_api.py": "distributed"}
NEEDS_TORCH = {f"trainer/data/{name}.py" for name in ("loader", "batched")}
MAY_USE_TORCH_DISTRIBUTED = {
    "trainer/distributed/failure.py",
    "trainer/distributed/group.py",
    "trainer/distributed/launch.py",
    "trainer/distributed/topology.py",
    "trainer/model/fsdp.py",
    "trainer/checkpoint/tensors.py",
}
LOAD_NO_TORCH = ("cli.main", "cli.plan", "cli.report", "data.packing")
NAMES_A_DTENSOR = ("torch.distributed.tensor", "torch.distributed.device_mesh")


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("trainer.")}


@of_each(modules())
def test_imports_run_one_way(module: Path) -> None:
    room = room_of(name_of(module))
    for imported in own(imports(module)):
        other = room_of(imported)
        is_allowed = room == other or FLOORS[other] < FLOORS[room] or LOOKS_UP.get(str(module)) == other
        assert is_allowed, f"{module} must not import {imported}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name_of(module): own(imports(module)) for module in modules()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in finished:
            for imported in graph.get(name, ()):
                visit(imported, (*path, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


@of_each([m for m in modules() if m.parts[1] == "data"])
def test_data_up_to_packing_needs_no_torch(module: Path) -> None:
    if str(module) not in NEEDS_TORCH:
        assert not any(name.split(".")[0] == "torch" for name in imports(module))


@of_each(modules())
def test_collectives_stay_behind_their_border(module: Path) -> None:
    if str(module) not in MAY_USE_TORCH_DISTRIBUTED:
        used = {name for name in imports(module) if name.startswith("torch.distributed")}
        assert all(name.startswith(NAMES_A_DTENSOR) for name in used), used


@of_each(modules())
def test_the_package_knows_no_tests(module: Path) -> None:
    assert not any(name.split(".")[0] in ("tests", "pytest", "hypothesis") for name in imports(module))


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [f"import {name}" for name in ("trainer", *(f"trainer.{part}" for part in LOAD_NO_TORCH))],
)
def test_importing_loads_no_torch(statement: str) -> None:
    assert not {"torch", "transformers"} & loaded_by(statement)


@of_each([m for m in modules() if m.name == "__init__.py" and len(m.parts) > 2])
def test_a_room_holds_its_docstring_and_nothing_else(module: Path) -> None:
    assert len(tree(module).body) == 1
