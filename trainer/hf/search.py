"""Hyperparameter search: one run for each trial of optuna, with a model, options and a folder of its own.

Knows of a Trainer its options, `train` and `evaluate`. Invariant: afterwards the options are what they were before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import BestRun, default_compute_objective, default_hp_space_optuna

from trainer.errors import MissingPackageError, UsageError

Objective = Callable[[dict[str, float]], Any]  # from an evaluation's metrics to a number, or one for each direction
OF_STUDY = ("timeout", "gc_after_trial", "catch")  # what optuna takes when a study runs, not when it is created


class TrialReport(TrainerCallback):
    """Tells a trial what each evaluation came to, and ends its run where the study gives it up."""

    def __init__(self, trial: Any, compute_objective: Objective, *, has_one_goal: bool) -> None:
        self._trial, self._compute, self._has_one_goal = trial, compute_objective, has_one_goal
        self.value: Any = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        """Report; several goals are not compared before the end."""
        import optuna

        self.value = self._compute(dict(metrics))
        if self._has_one_goal:
            self._trial.report(self.value, state.global_step)
            if self._trial.should_prune():
                raise optuna.TrialPruned(f"given up at step {state.global_step}")


class Search:
    """What is searched, and how a trial becomes a run.

    Args:
        trainer: trains with the options of each trial; it has a model_init.
        hp_space: from a trial to options and their values; by default learning rate, epochs, seed and batch size.
        compute_objective: what is optimised; by default the sum of all metrics, or the loss where there is no other.
        hp_name: from a trial to the name of its folder; by default run-N.
    """

    def __init__(
        self,
        trainer: Any,
        hp_space: Callable[[Any], Mapping[str, Any]] | None,
        compute_objective: Objective | None,
        hp_name: Callable[[Any], str] | None,
    ) -> None:
        check(trainer)
        self.trainer = trainer
        self.hp_space = hp_space or default_hp_space_optuna
        self.compute_objective = compute_objective or default_compute_objective
        self.hp_name = hp_name or (lambda trial: f"run-{trial.number}")
        self._options = vars(trainer.args).copy()

    def run(self, n_trials: int, direction: str | list[str], **settings: Any) -> BestRun | list[BestRun]:
        """Run all trials; gives the best, or those that no other beats in every goal."""
        import optuna

        of_study = {name: settings.pop(name) for name in OF_STUDY if name in settings}
        goals = {"directions": direction} if isinstance(direction, list) else {"direction": direction}
        study = optuna.create_study(**goals, **settings)
        study.optimize(self._try, n_trials=n_trials, **of_study)
        if isinstance(direction, list):
            return [BestRun(str(trial.number), trial.values, trial.params) for trial in study.best_trials]
        return BestRun(str(study.best_trial.number), study.best_trial.value, study.best_trial.params)

    def _try(self, trial: Any) -> Any:
        """Train and measure with the options of one trial."""
        args, folder = self.trainer.args, Path(self._options["output_dir"])
        report = TrialReport(trial, self.compute_objective, has_one_goal=len(trial.study.directions) == 1)
        self.trainer.add_callback(report)
        try:
            args.with_options(self.hp_space(trial))
            args.with_options({"output_dir": str(folder / self.hp_name(trial))})
            self.trainer.train(trial=trial)
            if report.value is None:
                self.trainer.evaluate()
            return report.value
        finally:
            self.trainer.remove_callback(report)
            vars(args).update(self._options)


def check(trainer: Any) -> None:
    """Raise an error where nothing can be searched: no optuna, no model_init, or several processes."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingPackageError.in_extra("hyperparameter_search needs the package optuna", "search") from error
    if trainer.model_init is None:
        raise UsageError("hyperparameter_search trains a new model in each trial: give model_init")
    if trainer.group.world_size > 1:
        raise UsageError("hyperparameter_search runs in one process: start it without torchrun")
