"""Hyperparameter search: a run for each trial, with options, a model and a folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.trainer_test_utils import (
    RegressionModelConfig,
    RegressionPreTrainedModel,
    get_regression_trainer,
)
from trainer.errors import MissingPackageError, UsageError
from trainer.hf.trainer import Trainer

RUN = {"eval_strategy": "epoch", "num_train_epochs": 2, "learning_rate": 0.1}


def build_model(trial: Any) -> RegressionPreTrainedModel:
    a = trial.suggest_int("a", -4, 4) if trial is not None else 0
    return RegressionPreTrainedModel(RegressionModelConfig(a=a))


def searcher(tmp_path: Path, **options: Any) -> Trainer:
    return get_regression_trainer(output_dir=tmp_path, **{**RUN, "model_init": build_model, **options})


class TestSearch:
    @pytest.fixture(autouse=True)
    def quiet(self) -> Any:
        pytest.importorskip("optuna").logging.set_verbosity("ERROR")

    def test_the_best_trial_is_that_of_the_lowest_loss(self, tmp_path: Path) -> None:
        trainer, seen = searcher(tmp_path, load_best_model_at_end=True, save_strategy="epoch"), {}
        before = trainer.args.to_dict()

        def space(trial: Any) -> dict[str, Any]:
            return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 0.5, log=True)}

        def objective(metrics: dict[str, float]) -> float:
            seen[Path(trainer.args.output_dir).name] = trainer.args.learning_rate, metrics["eval_loss"]
            return metrics["eval_loss"]

        best = trainer.hyperparameter_search(space, objective, n_trials=3)
        assert set(best.hyperparameters) == {"a", "learning_rate"}
        assert best.objective == min(loss for _, loss in seen.values())
        assert seen[f"run-{best.run_id}"] == (best.hyperparameters["learning_rate"], best.objective)
        assert len({rate for rate, _ in seen.values()}) == 3
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1", "run-2"]
        assert all((folder / "metrics.jsonl").is_file() for folder in tmp_path.iterdir())
        assert trainer.args.to_dict() == before

    def test_a_search_by_default_covers_learning_rate_epochs_seed_and_batch_size(self, tmp_path: Path) -> None:
        sizes = []
        trainer = searcher(tmp_path, eval_strategy="no")
        trainer.hyperparameter_search(
            n_trials=2, hp_name=lambda trial: f"t{trial.number}", compute_objective=lambda _: sizes.append(1) or 1.0
        )
        assert sizes == [1, 1]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["t0", "t1"]

    def test_options_of_a_trial_have_their_effect(self, tmp_path: Path) -> None:
        trainer, steps = searcher(tmp_path), []
        trainer.hyperparameter_search(
            lambda trial: {"per_device_train_batch_size": 2 ** (trial.number + 3)},
            lambda metrics: steps.append(trainer.state.global_step) or 0.0,
            n_trials=2,
        )
        assert steps == [8, 16, 4, 8]

    def test_several_goals_have_several_winners(self, tmp_path: Path) -> None:
        goals = ["minimize", "maximize"]
        values = iter([(1.0, 1.0), (2.0, 2.0), (3.0, 0.0)])
        found = searcher(tmp_path, num_train_epochs=1).hyperparameter_search(
            lambda trial: {}, lambda _: next(values), n_trials=3, direction=goals
        )
        assert [run.objective for run in found] == [[1.0, 1.0], [2.0, 2.0]]

    def test_a_trial_without_hope_is_given_up(self, tmp_path: Path) -> None:
        import optuna

        trainer, losses = searcher(tmp_path), iter([1.0, 1.0, 5.0, 5.0])
        pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=1)
        study = {"pruner": pruner, "sampler": optuna.samplers.RandomSampler(seed=0)}
        best = trainer.hyperparameter_search(lambda trial: {}, lambda _: next(losses), n_trials=2, **study)
        assert (best.run_id, next(losses)) == ("0", 5.0)
        assert trainer.state.global_step == 8
        assert not trainer.is_in_train

    @pytest.mark.parametrize(
        ("space", "message"),
        [({"learning_rat": 1.0}, "did you mean 'learning_rate'"), ({"learning_rate": -1.0}, "must be at least 0")],
    )
    def test_a_wrong_option_ends_the_search(self, tmp_path: Path, space: dict[str, Any], message: str) -> None:
        trainer = searcher(tmp_path)
        with pytest.raises(UsageError, match=message):
            trainer.hyperparameter_search(lambda trial: space, n_trials=1)
        assert trainer.args.output_dir == str(tmp_path)

    def test_models_must_be_made_anew(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="give model_init"):
            get_regression_trainer(output_dir=tmp_path).hyperparameter_search(n_trials=1)


def test_the_package_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'reference-trainer\[search\]'"):
        searcher(tmp_path).hyperparameter_search(n_trials=1)


def test_other_backends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="backend = ray: only optuna is supported"):
        searcher(tmp_path).hyperparameter_search(backend="ray")


@pytest.mark.world_size(2)
def test_several_processes_are_refused(ranks) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UsageError, match="runs in one process"):
        searcher(ranks.tmp_path).hyperparameter_search(n_trials=1)
