"""A checkpoint as files: values and tensors come back bit for bit, damage shows, nothing appears before it is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tests.fixtures.ranks.faults import flip_bit, truncate
from trainer.atomic import publish_folder, read_sealed, stage_folder, write_file, write_json, write_sealed
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.tensors import DTYPES, pack, safetensors_chunks, unpack
from trainer.checkpoint.verify import find_damage
from trainer.cli.main import main
from trainer.errors import CheckpointError

numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
values = st.recursive(
    numbers,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=20,
)


@given(value=values)
def test_any_value_comes_back_type_for_type(value: Any) -> None:
    import json

    tensors: dict[str, torch.Tensor] = {}
    form = json.loads(json.dumps(pack(value, "it", tensors)))
    back = unpack(form, tensors.__getitem__)
    assert repr(back) == repr(value)
    assert not tensors


def test_tensors_of_a_value_have_names() -> None:
    step, moments = torch.tensor(3.0), torch.arange(4)
    tensors: dict[str, torch.Tensor] = {}
    form = pack({"a.weight": {"step": step, "pair": (moments, None)}, 7: 1}, "state", tensors)
    assert tensors == {"state/a.weight/step": step, "state/a.weight/pair/0": moments}
    assert unpack(form, tensors.__getitem__) == {"a.weight": {"step": step, "pair": (moments, None)}, 7: 1}


def test_what_needs_code_to_come_back_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"state/a is a builtins.object: only numbers, texts, tensors"):
        pack({"a": object()}, "state", {})


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two tensors"):
        pack({"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, "x", {})


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_the_safetensors_library_reads_what_we_write(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {f"of {dtype}": torch.full(shape, 1).to(dtype) for dtype in DTYPES}
    fact = write_file(tmp_path / "file", safetensors_chunks(tensors))
    assert fact.num_bytes == (tmp_path / "file").stat().st_size
    with safe_open(tmp_path / "file", framework="pt") as file:
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read.to(torch.float64), tensor.to(torch.float64))


def write_checkpoint(checkpoints: Path, step: int, run_id: str | None = None) -> Path:
    """Weights alone: a checkpoint of two plain files, without tensors."""
    target = manifest.folder_of(checkpoints, step)
    hidden = stage_folder(manifest.hidden_name(target, "writing", run_id))
    files = {name: write_file(hidden / name, [b"x" * 100]) for name in ("one", "model/two")}
    files["tensors.json"] = write_json(hidden / "tensors.json", {"world_size": 1, "tensors": {}})
    write_sealed(hidden / "rank_0.json", {})
    files["rank_0.json"] = read_sealed(hidden / "rank_0.json")[1]
    write_manifest(hidden, Manifest(step, 1, False, files, run_id=run_id))
    publish_folder(hidden, target)
    return target


def write_manifest(folder: Path, about: Manifest) -> None:
    files = {name: vars(fact) for name, fact in about.files.items()}
    write_sealed(folder / "manifest.json", {**vars(about), "files": files})


FILES = ("one", "model/two", "tensors.json", "rank_0.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink], ids=["flipped", "truncated", "removed"])
def test_damage_to_any_file_shows(tmp_path: Path, name: str, damage: Any) -> None:
    folder = write_checkpoint(tmp_path, 3)
    assert find_damage(folder) == []
    damage(folder / name)
    (fault, *_) = find_damage(folder)
    assert name in fault


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    whole = (folder / "manifest.json").read_bytes()
    silent = []
    for bit in range(0, 8 * len(whole), 5):
        flip_bit(folder / "manifest.json", bit)
        if not find_damage(folder) and manifest.read_manifest(folder).step != 3:
            silent.append(bit)
        (folder / "manifest.json").write_bytes(whole)
    assert silent == []


def test_a_manifest_of_another_format_is_named(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(1, 1, True, {}, format_version=99))
    with pytest.raises(CheckpointError, match="format 99, this trainer reads 1 to 2; a newer one may read it"):
        manifest.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(1, None, [5]), (2, None, [4, 5]), (1, 2, [2, 5]), (2, 2, [2, 5]), (3, 2, [2, 4, 5]), (9, 2, [1, 2, 3, 4, 5])],
)
def test_retention_keeps_the_newest_and_the_best(tmp_path: Path, limit: int, best: int | None, kept: list[int]) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step_notes").mkdir()
    removed = manifest.retire(tmp_path, limit, best, None)
    assert sorted(map(manifest.step_of, manifest.list_checkpoints(tmp_path))) == kept
    assert len(removed) == 5 - len(kept)
    assert not list(tmp_path.glob(".step_*"))


def test_only_leftovers_of_the_run_itself_are_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    for run_id in ("mine", "other", None):
        stage_folder(manifest.hidden_name(tmp_path / "step_4", "writing", run_id))
    (tmp_path / ".step_notes").mkdir()
    manifest.remove_leftovers(tmp_path, {"mine"})
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [".step_4.writing", ".step_4.writing-other", ".step_notes", "step_3"]


def test_retention_counts_and_removes_only_the_runs_own(tmp_path: Path) -> None:
    for step, run_id in enumerate(["mine", "other", "mine", None, "mine", "mine"]):
        write_checkpoint(tmp_path, step, run_id)
    flip_bit(tmp_path / "step_4" / "manifest.json")
    manifest.retire(tmp_path, 1, None, "mine")
    assert sorted(map(manifest.step_of, manifest.list_checkpoints(tmp_path))) == [1, 3, 4, 5]


def test_what_others_put_into_a_checkpoint_outlives_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", step)
    adapter = tmp_path / "checkpoints" / "step_1" / "model" / "adapter.bin"
    adapter.write_text("mine")
    assert find_damage(adapter.parents[1]) == []
    manifest.retire(tmp_path / "checkpoints", 1, None, None)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "step_1" in str(path)]
    assert left == [tmp_path / "checkpoints.discarded" / "step_1" / "model" / "adapter.bin"]
    assert "files that the trainer did not write" in caplog.text


def test_verify_says_what_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", step)
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(": whole") == 2
    flip_bit(tmp_path / "checkpoints" / "step_2" / "one")
    assert main(["verify", str(tmp_path / "checkpoints")]) == 1
    assert "step_2: damaged\n  one does not have the content that was written" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "checkpoints" / "step_1")]) == 0
    assert main(["verify", str(tmp_path / "elsewhere")]) == 2
