"""L4 with orthogonal subspace fine-tuning: what is split, projected and measured goes on like everything else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.fixtures.models import build_pack, tiny_llama
from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import read_metrics, step_lines, weights_of
from tests.fixtures.tolerances import OSFT_LOGITS_FP32, OSFT_TRAJECTORY_FLOAT64
from tests.laws.test_resume import EPOCH, at, build, check_going_on, copy_run, hashes, is_tiny, record
from trainer.cli.main import main
from trainer.errors import NonFiniteError, UsageError
from trainer.hf.trainer import Trainer
from trainer.optim.registry import OPTIMIZERS

NUM_STEPS = 4
SPLIT = {"osft": True, "osft_unfreeze_rank_ratio": 0.5, "num_train_epochs": NUM_STEPS / EPOCH, "eval_strategy": "no"}


def build_split(folder: Path, stop_after: int | None = None, **options: Any) -> Trainer:
    return build(folder, stop_after, **{"model": tiny_llama(attention_dropout=0.1), **SPLIT, **options})


def without_starts(checkpoint: Path) -> Any:
    """The state of a checkpoint, without the log lines that each process begins with."""
    state = record(checkpoint)
    state["history"] = [line for line in state.get("history", []) if "osft/num_decomposed" not in line]
    return state


def num_decomposed(trainer: Trainer) -> list[float]:
    """Matrices that were decomposed at the start of each process of a run."""
    name = "osft/num_decomposed"
    return [line[name] for line in trainer.state.log_history if name in line]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=build_pack([20])["input_ids"], use_cache=False).logits


def same_weights(export: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (export, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.world_size(1, 2)
def test_a_split_model_goes_on_bit_for_bit(ranks) -> None:
    straight, folder = ranks.tmp_path / "straight", ranks.tmp_path / "resumed"
    options = {"max_tokens_per_rank": 16}  # several packs in some steps
    build_split(straight, **options).train()
    ranks.barrier()
    if ranks.is_main:
        folder.mkdir()
        copy_run(straight, folder, 2)
    ranks.barrier()
    trainer = build_split(folder, model=tiny_llama(attention_dropout=0.1, seed=1), **options)
    trainer.train(resume_from_checkpoint=True)
    ranks.barrier()
    assert num_decomposed(trainer) == [14, 0]
    assert read_metrics(folder) == read_metrics(straight)
    assert all("osft/leak" in line for line in step_lines(folder))
    for step in (3, NUM_STEPS):
        assert hashes(at(folder, step)) == hashes(at(straight, step))
        assert without_starts(at(folder, step)) == without_starts(at(straight, step))


def steps_beside_osft(name: str) -> bool:
    """Not what the engine refuses beside OSFT."""
    return is_tiny(name) and not (OPTIMIZERS[name].steps_in_backward or OPTIMIZERS[name].averages_weights)


@pytest.mark.parametrize("optim", [*filter(steps_beside_osft, OPTIMIZERS)])
def test_every_optimizer_of_a_split_model_goes_on_bit_for_bit(tmp_path: Path, optim: str) -> None:
    check_going_on(tmp_path, optim, osft=True, osft_unfreeze_rank_ratio=0.5)


def train_on(folder: Path, stop_after: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Go on from the newest checkpoint, in float64 without dropout; gives the weights, and what was decomposed."""
    trainer = build_split(
        folder, stop_after, model=tiny_llama(dtype=torch.float64), use_cpu=True, osft_svd_dtype="float64"
    )
    trainer.train(resume_from_checkpoint="auto")
    weights = weights_of(trainer.model)
    trainer.group.close()
    return weights, num_decomposed(trainer)


def test_other_numbers_of_ranks_take_over_a_split_model(launch, tmp_path: Path) -> None:
    ((alone, _),) = launch(1, train_on, tmp_path / "alone", NUM_STEPS).values
    folder = tmp_path / "handed_on"
    for step, world_size in enumerate((1, 2, 3, 1), 1):
        (weights, decomposed), *_ = launch(world_size, train_on, folder, step).values
    assert decomposed == [14, 0, 0, 0]
    assert relative_difference(weights, alone) < OSFT_TRAJECTORY_FLOAT64


def test_a_checkpoint_of_a_split_model_is_exported_as_what_it_computes(tmp_path: Path) -> None:
    trainer = build_split(tmp_path / "run", osft_adaptive_samples=4, num_train_epochs=2 / EPOCH)
    trainer.train()
    assert main(["export", str(at(tmp_path / "run", 2)), str(tmp_path / "export")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert (logits_of(exported) - logits_of(trainer.model)).abs().max() < OSFT_LOGITS_FP32
    assert same_weights(tmp_path / "export", trainer.save_model(tmp_path / "by_the_run"))


def test_the_ratios_of_blocks_come_from_the_checkpoint(tmp_path: Path) -> None:
    build_split(tmp_path / "straight", osft_adaptive_samples=4).train()
    (folder := tmp_path / "resumed").mkdir()
    copy_run(tmp_path / "straight", folder, 2)

    def run_from_other_weights(**options: Any) -> Trainer:  # in which another importance would be measured
        return build_split(folder, model=tiny_llama(seed=1, attention_dropout=0.1), osft_adaptive_samples=4, **options)

    with pytest.raises(UsageError, match="another importance of the blocks than was measured now .*resume_from_checkp"):
        run_from_other_weights().train(resume_from_checkpoint=True)
    run_from_other_weights(resume_from_checkpoint="auto").train()
    assert hashes(at(folder, NUM_STEPS)) == hashes(at(tmp_path / "straight", NUM_STEPS))


class Overflow(TrainerCallback):
    """Makes one update of a split matrix so large, in the second step, that what it gives is infinite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 1:
            model.model.layers[1].mlp.up_proj.osft_update.data.fill_(1e38)


def test_a_step_of_a_split_model_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = build_split(tmp_path, osft_adaptive_samples=4)
    trainer.add_callback(Overflow())
    with pytest.raises(NonFiniteError, match="step 2: loss is nan.*trainer replay"):
        trainer.train()
    assert main(["replay", str(tmp_path / "crash" / "step_2"), "--use-cpu"]) == 0
    assert "forward: output of model.layers.1.mlp.up_proj (OsftLinear)" in capsys.readouterr().out


@pytest.mark.world_size(1, 2)
def test_the_best_split_weights_come_back_at_the_end(ranks) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = build_split(ranks.tmp_path / "run", warmup_steps=0, **options)
    trainer.train()
    assert trainer.state.best_global_step < NUM_STEPS
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    exported = trainer.save_model(ranks.tmp_path / "export")
    if ranks.is_main:
        assert main(["export", trainer.state.best_model_checkpoint, str(ranks.tmp_path / "best")]) == 0
        assert same_weights(exported, ranks.tmp_path / "best")
