"""Records of a checkpoint are read by what they hold, whoever wrote them; a wrong form is named and not obeyed."""

import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.fixtures.models import tiny_llama
from tests.fixtures.ranks.faults import flip_bit
from tests.fixtures.runs import build_trainer, random_token_samples, read_metrics, weights_of
from tests.fixtures.tolerances import RELEASED_FP32
from tests.trainer.trainer_test_utils import get_regression_trainer
from trainer.atomic import read_sealed, write_sealed
from trainer.checkpoint.run_state import PER_PROCESS, restore_state
from trainer.checkpoint.verify import find_damage
from trainer.cli.main import main
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import is_union, types_of
from trainer.errors import CheckpointError, TrainerError, UsageError
from trainer.hf.trainer import Trainer
from trainer.training.callbacks import RunState

RELEASED = sorted((Path(__file__).parent / "fixtures" / "data").glob("checkpoint_*.zip"))
SAMPLES = random_token_samples([4 + i * 5 % 11 for i in range(8)])
SMALLEST: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
SMALLEST |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
RECORDS = ("state.json", "training_params.json", "optimizer.json", "tensors.json", "rank_0.json", "manifest.json")


@pytest.mark.parametrize("archive", RELEASED, ids=lambda path: path.stem)
def test_a_checkpoint_of_each_released_format_is_verified_exported_and_resumed(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was saved after 2 of 4 steps of the same run, with the weights that its own version had after the last."""
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_2"
    assert main(["verify", str(checkpoint)]) == 0, capsys.readouterr().out
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.hidden_size == 8
    options = {"batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "async_save": False}
    trainer = build_trainer(tmp_path, SAMPLES, tiny_llama(seed=1, **SMALLEST), use_cpu=True, **options)
    trainer.train(resume_from_checkpoint="auto")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    weights = weights_of(trainer.model)
    for name, expected in load_file(tmp_path / "after_step_4.safetensors").items():
        assert torch.allclose(weights[name], expected, rtol=RELEASED_FP32, atol=RELEASED_FP32), name


@dataclasses.dataclass
class OwnArguments(TrainingArguments):
    my_option: int = 3


def own_run(folder: Path, **options: Any) -> Trainer:
    defaults = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "async_save": False, "export_final": False}
    return Trainer(
        model=tiny_llama(**SMALLEST),
        args=OwnArguments(str(folder), batch_size=2, max_tokens_per_rank=64, **{**defaults, **options}),
        train_dataset=build_trainer(folder / "other", SAMPLES, tiny_llama(**SMALLEST)).train_dataset,
    )


def test_a_run_with_options_of_its_own_is_exported_verified_and_resumed(tmp_path: Path) -> None:
    own_run(tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0
    assert main(["verify", str(checkpoint)]) == 0
    resumed = own_run(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 2
    with pytest.raises(UsageError, match="my_option was 3 when it was saved, 4 now"):
        own_run(tmp_path / "run", my_option=4).train(resume_from_checkpoint=True)


def test_an_option_that_was_renamed_since_is_understood(tmp_path: Path) -> None:
    own_run(tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    options = json.loads((checkpoint / "training_params.json").read_text())
    options["max_tokens_per_gpu"] = options.pop("max_tokens_per_rank")
    rewrite(checkpoint, "training_params.json", json.dumps(options).encode())
    assert main(["verify", str(checkpoint)]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0
    own_run(tmp_path / "run").train(resume_from_checkpoint=True)


def rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """Change a file of a checkpoint as one who can compute hashes would."""
    (checkpoint / name).write_bytes(content)
    if name == "manifest.json":
        return
    about, _ = read_sealed(checkpoint / "manifest.json")
    about["files"][name] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_sealed(checkpoint / "manifest.json", about)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run on rows."""
    folder = tmp_path_factory.mktemp("whole")
    regression(folder).train()
    return folder / "checkpoints" / "step_2"


def regression(folder: Path) -> Trainer:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "async_save": False}
    return get_regression_trainer(output_dir=folder, disable_tqdm=True, **options)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "checkpoints" / "step_2")
    return tmp_path / "checkpoints" / "step_2"


class TestOtherFields:
    def test_more_and_fewer_fields_are_read(self, damaged: Path) -> None:
        """Records of versions that knew more, or less, than this one."""
        about, _ = read_sealed(damaged / "manifest.json")
        state = json.loads((damaged / "state.json").read_bytes())
        del state["stream"], state["state"]["loss_scale"], state["state"]["log_history"]
        state["later"] = state["state"]["later"] = about["later"] = 1
        del about["versions"]
        write_sealed(damaged / "manifest.json", about)
        rewrite(damaged, "state.json", json.dumps(state).encode())
        assert find_damage(damaged) == []
        trainer = regression(damaged.parents[1])
        trainer.train(resume_from_checkpoint=str(damaged))
        assert (trainer.state.global_step, trainer.state.resumed_step, trainer.state.loss_scale) == (2, 2, 1.0)

    @pytest.mark.parametrize(
        ("name", "value"), [("schedule", []), ("should_stop", "no"), ("fingerprints", None), ("metrics_bytes", "9")]
    )
    def test_another_type_is_named(self, damaged: Path, name: str, value: Any) -> None:
        state = json.loads((damaged / "state.json").read_bytes())
        rewrite(damaged, "state.json", json.dumps(state | {name: value}).encode())
        with pytest.raises(CheckpointError, match=rf"state.json is no record of a run \({name} = "):
            regression(damaged.parents[1]).train(resume_from_checkpoint=str(damaged))

    def test_another_type_in_the_state_is_named(self, damaged: Path) -> None:
        state = json.loads((damaged / "state.json").read_bytes())
        state["state"]["log_history"] = None
        rewrite(damaged, "state.json", json.dumps(state).encode())
        with pytest.raises(CheckpointError, match="log_history = None in the state: expected a list, each an object"):
            regression(damaged.parents[1]).train(resume_from_checkpoint=str(damaged))

    def test_every_field_of_the_state_is_of_its_type(self) -> None:
        """What fits no field, what fits only some, and the null that only fields allow which say so."""
        wrong: dict[type, list[Any]] = {
            int: [2.5, True, "2", [], {}],
            float: ["0", False, [], {}],
            bool: [1, 0.0, "true", []],
            str: [1, True, []],
            list: [{}, "x", [1], [None]],
            dict: [[], "x", 1, {"loss": None}, {"loss": []}],
        }
        fresh = RunState()
        met = set()
        for name, hint in types_of(RunState).items():
            if name in PER_PROCESS:
                continue
            parts = get_args(hint) if is_union(hint) else (hint,)
            kind, is_optional = get_origin(parts[0]) or parts[0], type(None) in parts
            met.add(kind)
            for value in wrong[kind] + ([] if is_optional else [None]):
                with pytest.raises(CheckpointError, match=f"^{name} = .* in the state: expected "):
                    restore_state(fresh, {"global_step": 7, name: value})
            restore_state(fresh, {name: None if is_optional else getattr(fresh, name)})
        assert met == set(wrong)
        assert fresh == RunState()  # nothing was set beside what was refused


class TestWhatVerifyFinds:
    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("name", ["manifest.json", "state.json", "model_0.safetensors", "rank_0.json"])
    def test_pipes_and_devices_are_not_read(self, damaged: Path, name: str) -> None:
        (damaged / name).unlink()
        os.mkfifo(damaged / name)
        (fault,) = find_damage(damaged)
        assert f"{name} is not a regular file" in fault
        (damaged / name).unlink()
        (damaged / name).symlink_to("/dev/zero")
        (fault,) = find_damage(damaged)
        assert f"{name} is not a regular file" in fault

    @pytest.mark.parametrize("name", ["../outside", "/etc/hostname", ""])
    def test_recorded_file_names_stay_inside_the_folder(self, damaged: Path, name: str) -> None:
        about, _ = read_sealed(damaged / "manifest.json")
        about["files"][name] = about["files"]["state.json"]
        write_sealed(damaged / "manifest.json", about)
        assert "is no name of a file inside the folder" in find_damage(damaged)[0]

    @pytest.mark.parametrize("name", [*RECORDS[:-1]])
    def test_what_the_manifest_does_not_list_is_missing(self, damaged: Path, name: str) -> None:
        about, _ = read_sealed(damaged / "manifest.json")
        del about["files"][name]
        write_sealed(damaged / "manifest.json", about)
        assert f"{name} is missing: the manifest does not list it" in find_damage(damaged)

    def test_a_renamed_folder_is_named(self, damaged: Path) -> None:
        damaged.rename(damaged.with_name("step_4"))
        assert find_damage(damaged.with_name("step_4")) == ["manifest.json is of step 2: the folder was renamed"]

    def test_one_line_tells_of_a_damaged_file(self, damaged: Path) -> None:
        flip_bit(damaged / "model_0.safetensors")
        rewrite(damaged, "optimizer_0.safetensors", (1).to_bytes(8, "little") + b"{")
        model, optimizer = find_damage(damaged)
        assert model == "model_0.safetensors does not have the content that was written"
        assert optimizer.startswith("optimizer_0.safetensors")
        assert "no safetensors file" in optimizer

    def test_an_index_beyond_its_tensors_is_named(self, damaged: Path) -> None:
        index = json.loads((damaged / "tensors.json").read_text())
        index["tensors"]["a"]["pieces"][0].update(offset=[7], shape=[1])
        rewrite(damaged, "tensors.json", json.dumps(index).encode())
        assert any(fault.startswith("tensors.json a: a piece") for fault in find_damage(damaged))

    def test_files_of_others_are_named_and_no_damage(self, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (damaged / "adapter.bin").write_text("x")
        assert main(["verify", str(damaged)]) == 0
        assert "also holds adapter.bin, which the trainer did not write" in capsys.readouterr().out


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a value; of a long list to its first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def with_one_changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = value.copy()
    changed[path[0]] = with_one_changed(value[path[0]], path[1:], new)
    return changed


def write_changed(checkpoint: Path, name: str, data: st.DataObject) -> None:
    """Write a record with one value changed, or any JSON, or any bytes, under a valid hash."""
    is_sealed = name in ("manifest.json", "rank_0.json")
    old = read_sealed(checkpoint / name)[0] if is_sealed else json.loads((checkpoint / name).read_bytes())
    how = data.draw(st.sampled_from(["field", "field", "field", "json", "bytes"]))
    if how == "bytes":
        rewrite(checkpoint, name, data.draw(st.binary(max_size=50)))
        return
    new = data.draw(json_values)
    if how == "field":
        new = with_one_changed(old, data.draw(st.sampled_from([*places(old)])), new)
    if is_sealed:
        write_sealed(checkpoint / name, new)
        rewrite(checkpoint, name, (checkpoint / name).read_bytes())
    else:
        rewrite(checkpoint, name, json.dumps(new).encode())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_record_makes_verify_fail_with_anything_but_a_verdict(whole: Path, tmp_path: Path, data: Any) -> None:
    checkpoint = tmp_path / "step_2"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(whole, checkpoint)
    write_changed(checkpoint, data.draw(st.sampled_from(RECORDS)), data)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert all(isinstance(fault, str) for fault in find_damage(checkpoint))
    assert sorted(path for path in tmp_path.rglob("*")) == before


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_record_makes_a_resume_fail_with_anything_but_our_errors(whole: Path, tmp_path: Path, data: Any) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.parents[1], folder)
    write_changed(folder / "checkpoints" / "step_2", data.draw(st.sampled_from(RECORDS)), data)
    trainer = regression(folder)
    try:
        trainer.train(resume_from_checkpoint=True)
    except TrainerError:
        return
    assert trainer.state.global_step >= 0
