"""Orthogonal subspace fine-tuning in whole runs: options, metrics, exports, and that a leak ends them."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.fixtures.forgetting import draw_tasks, learn, learner, split_copy
from tests.fixtures.models import build_pack, tiny_llama
from tests.fixtures.oracles import linear_schedule, mean_loss, protected_share, relative_difference
from tests.fixtures.runs import build_arguments, build_trainer, random_token_samples, step_lines, weights_of
from tests.fixtures.splitting import osft_arguments, started
from tests.fixtures.tolerances import (
    CLOSED_FORM_FLOAT64,
    FORGETTING_LEARNED,
    FORGETTING_RETAINED,
    LOSS_BF16,
    OSFT_LEAK,
    OSFT_LOGITS_FP32,
    OSFT_NORM_FP32,
    OSFT_TRAJECTORY_FLOAT64,
)
from trainer.cli.main import main
from trainer.cli.progress import ProgressDisplay
from trainer.data.order import epoch_order
from trainer.errors import LeakError, UsageError
from trainer.mini_trainer import MiniTrainerFlags
from trainer.model.osft.layers import apply_osft, merged_weight, osft_layers, target_ratios

SAMPLES = random_token_samples((9, 3, 17, 5, 30, 2, 11, 7, 24, 4, 13, 6))
METRICS = {"osft/leak", "osft/projected_share", "osft/reconstruction_error"}


def osft_trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    defaults = {"osft": True, "osft_unfreeze_rank_ratio": 0.25, "weight_decay": 0.1}
    return build_trainer(folder, SAMPLES, model, **{**defaults, **options})


def test_every_step_reports_what_osft_does(tmp_path: Path) -> None:
    trainer = osft_trainer(tmp_path, logging_steps=1)
    trainer.train()
    lines = step_lines(tmp_path)
    assert len(lines) == 3
    for line in lines:
        assert line.keys() >= METRICS
        assert line["osft/leak"] < OSFT_LEAK[torch.float32]
        assert line["osft/reconstruction_error"] < OSFT_LEAK[torch.float32]
        assert 0 < line["osft/projected_share"] < 1
    logged = trainer.state.log_history
    assert logged[0]["osft/num_decomposed"] == 14
    assert logged[0]["osft/start_seconds"] > 0
    assert logged[1].keys() >= METRICS


def test_a_run_moves_what_is_free_and_nothing_else(tmp_path: Path) -> None:
    """After every step; the run's own guard is off."""
    before = weights_of(tiny_llama())

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            for name, layer in osft_layers(model).items():
                weight = before[f"{name}.weight"]
                change = merged_weight(layer).double() - weight.double()
                share = protected_share(change, weight, math.ceil(min(weight.shape) / 4))
                assert share < OSFT_LEAK[torch.float32], (
                    f"L9 frozen stays frozen: after step {state.global_step} {name} has moved in protected directions "
                    f"({share:.2g} of its change)"
                )

    trainer = osft_trainer(tmp_path, num_train_epochs=4, export_final=True, osft_leak_limit=1e9, callbacks=[Look()])
    trainer.train()
    split = {f"{name}.weight" for name in osft_layers(trainer.model)}
    after = weights_of(AutoModelForCausalLM.from_pretrained(trainer.save_model(), dtype=torch.float32))
    for name, weight in after.items():
        if name not in split:
            assert torch.equal(weight, before[name]), f"L9 frozen stays frozen: {name} has moved"
            continue
        change = weight.double() - before[name].double()
        assert protected_share(change, before[name], math.ceil(min(weight.shape) / 4)) < OSFT_LEAK[torch.float32]


def test_an_export_is_the_trained_model(tmp_path: Path) -> None:
    trainer = osft_trainer(tmp_path)
    trainer.train()
    folder = trainer.save_model(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(exported.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = build_pack([20])["input_ids"]
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=ids, use_cache=False).logits
        assert (exported(input_ids=ids).logits - ours).abs().max() < OSFT_LOGITS_FP32
    assert main(["export", str(folder), str(tmp_path / "again")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert all(torch.equal(weight, weights_of(exported)[name]) for name, weight in weights_of(again).items())


def test_the_gradient_norm_is_that_of_what_moves(tmp_path: Path) -> None:
    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.norm = torch.nn.utils.get_total_norm(gradients).item()
            layers = osft_layers(model).values()
            self.kept = max((layer.osft_protected.T @ layer.osft_update.grad).abs().max().item() for layer in layers)

    norms = Norms()
    osft_trainer(tmp_path, callbacks=[norms], max_grad_norm=0, max_steps=1).train()
    assert step_lines(tmp_path)[0]["grad_norm"] == pytest.approx(norms.norm, rel=OSFT_NORM_FP32)
    assert norms.kept < OSFT_LEAK[torch.float32] * norms.norm


def test_a_leak_ends_the_run(tmp_path: Path) -> None:
    class Push(TrainerCallback):
        """Makes the projection impossible: the protected directions are no longer orthonormal."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 1:
                next(iter(osft_layers(model).values())).osft_protected.data.mul_(1.1)

    trainer = osft_trainer(tmp_path, callbacks=[Push()])
    with pytest.raises(LeakError, match=r"osft/leak is .* in model\.layers\.0\..*, the limit 0.0001"):
        trainer.train()
    assert len(step_lines(tmp_path)) == 1


@pytest.mark.world_size(1, 2, 3)
def test_a_run_is_the_run_by_hand(ranks: Any, tmp_path: Path) -> None:
    losses, weights = ranks.once(by_hand)
    trainer = osft_trainer(tmp_path, tiny_llama().double(), osft_svd_dtype="float64", max_tokens_per_rank=48)
    trainer.train()
    if ranks.is_main:
        assert [line["loss"] for line in step_lines(tmp_path)] == pytest.approx(losses, rel=OSFT_TRAJECTORY_FLOAT64)
    found = {name: merged_weight(layer) for name, layer in osft_layers(trainer.model).items()}
    assert relative_difference(found, weights) < OSFT_TRAJECTORY_FLOAT64


def by_hand() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The run in plain torch: one sample after another, AdamW, linear decay, clipping what is left of the gradient."""
    model = tiny_llama().double()
    apply_osft(model, args := osft_arguments(osft_svd_dtype="float64"))
    osft = started(model, args)
    updates = [layer.osft_update for layer in osft.layers]
    optimizer = torch.optim.AdamW(updates, lr=1e-2, weight_decay=0.1, foreach=False)
    losses = []
    for step, indices in enumerate(epoch_order(len(SAMPLES), 42, 0).reshape(3, 4), start=1):
        loss = mean_loss(model, [SAMPLES[i] for i in indices])
        loss.backward()
        for layer in osft.layers:
            protected = layer.osft_protected
            layer.osft_update.grad -= protected @ (protected.T @ layer.osft_update.grad)
        torch.nn.utils.clip_grad_norm_(updates, 1.0, foreach=False)
        optimizer.param_groups[0]["lr"] = linear_schedule(step, 1e-2, 0, 3)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for layer in osft.layers:
                layer.osft_update -= layer.osft_protected @ (layer.osft_protected.T @ layer.osft_update)
        losses.append(loss.item())
    return losses, {name: merged_weight(layer) for name, layer in osft_layers(model).items()}


@pytest.mark.world_size(2)
def test_shards_train_in_bf16(ranks: Any, tmp_path: Path) -> None:
    """With several packs in each step."""
    found = []
    for is_bf16 in (False, True):
        trainer = osft_trainer(
            tmp_path / str(is_bf16), bf16=is_bf16, batch_size=6, max_tokens_per_rank=32, logging_steps=1
        )
        trainer.train()
        found.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert {layer.osft_update.dtype for layer in osft_layers(trainer.model).values()} == {torch.float32}
        leaks = [line["osft/leak"] for line in trainer.state.log_history if "osft/leak" in line]
        assert max(leaks) < OSFT_LEAK[torch.float32]
        if ranks.is_main:
            assert max(line["num_micro_batches"] for line in step_lines(tmp_path / str(is_bf16))) > 1
    assert found[1] == pytest.approx(found[0], rel=LOSS_BF16)
    assert found[1] != found[0]


def test_important_blocks_get_a_smaller_ratio(tmp_path: Path) -> None:
    trainer = osft_trainer(tmp_path, osft_adaptive_samples=8, osft_unfreeze_rank_ratio=0.5)
    ranks = [
        {layer.osft_free.shape[1] for name, layer in osft_layers(trainer.model).items() if f"layers.{i}.mlp" in name}
        for i in (0, 1)
    ]
    assert ranks[0] != ranks[1]
    assert all(len(rank) == 1 for rank in ranks)


def test_ratios_follow_importance() -> None:
    args = build_arguments(Path("out"), osft=True, osft_unfreeze_rank_ratio=0.4, osft_rank_ratios={"1.up": 0.1})
    ratios = target_ratios(["0.up", "1.up", "1.down", "2.up"], args, {"0": 0.5, "1": 1.0, "2": 3.0})
    expected = {"0.up": 0.55, "1.up": 0.1, "1.down": 0.4, "2.up": 0.0}
    assert ratios == pytest.approx(expected, abs=CLOSED_FORM_FLOAT64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"osft": True}, "osft needs osft_unfreeze_rank_ratio"),
        ({"osft_unfreeze_rank_ratio": 0.5}, "has no effect without osft"),
        ({"osft_train_patterns": ["norm"]}, "has no effect without osft"),
        ({"osft": True, "osft_unfreeze_rank_ratio": 1.5}, "osft_unfreeze_rank_ratio = 1.5: must be at most 1"),
        ({"osft": True, "osft_unfreeze_rank_ratio": 0.5, "osft_rank_ratios": {"a": 2}}, "a number from 0 to 1"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        build_arguments(tmp_path, **options)


def test_mini_trainers_flags_mean_what_they_mean_there() -> None:
    required = {"model_name_or_path": "m", "data_path": "d", "batch_size": 4, "max_tokens_per_gpu": 9}
    flags = MiniTrainerFlags(
        **required,
        learning_rate=1e-5,
        output_dir="out",
        osft=True,
        osft_unfreeze_rank_ratio=0.5,
        osft_target_patterns="'self_attn.q_proj', mlp.gate_proj.weight",
        osft_upcast_dtype="float64",
    )
    args = flags.to_arguments()
    assert (args.osft, args.osft_unfreeze_rank_ratio, args.osft_svd_dtype) == (True, 0.5, "float64")
    model = tiny_llama()
    apply_osft(model, args)
    assert {name.partition("layers.")[2][2:] for name in osft_layers(model)} == {"self_attn.q_proj", "mlp.gate_proj"}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        f"{name}.{part}" for name in osft_layers(model) for part in ("weight", "osft_free", "osft_protected")
    }


def test_the_decomposition_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    osft_trainer(tmp_path, callbacks=[ProgressDisplay()], max_steps=1).train()
    assert "decomposed the matrices in " in capsys.readouterr().out


@pytest.mark.learns
def test_osft_forgets_less_than_full_fine_tuning_at_the_same_learning_rate() -> None:
    """At one learning rate: with a smaller one full fine-tuning keeps more too (see docs/osft.md)."""
    first, second = draw_tasks(seed=0, sizes=(128, 64), vocabulary=64)
    model = learner(seed=0, hidden_size=64, vocabulary=64)
    learn(model, first, 3e-3, num_steps=100)
    assert first.accuracy(model) >= FORGETTING_LEARNED
    full, (split, osft) = copy.deepcopy(model), split_copy(model, 0.25)
    learn(full, second, 3e-3, num_steps=100)
    learn(split, second, 3e-3, num_steps=100, osft=osft)
    assert min(second.accuracy(full), second.accuracy(split)) >= FORGETTING_LEARNED
    assert first.accuracy(full) < FORGETTING_RETAINED / 2
    assert first.accuracy(split) > FORGETTING_RETAINED
