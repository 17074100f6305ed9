"""Trainer: the class with the arguments, methods and override points of transformers' Trainer.

It makes a task of what it is given: token data is packed, any other data set goes through the methods below. Evaluation
over batches is in `prediction.py`, the hub in `hub.py`, what is not supported in `unsupported.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_callback import (
    CallbackHandler,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import BestRun, EvalLoopOutput, PredictionOutput, TrainOutput

from trainer.config.arguments import TrainingArguments
from trainer.data.batched import Collate, has_length
from trainer.data.loader import is_token_data, to_device
from trainer.errors import UsageError
from trainer.hf import hub
from trainer.hf.accelerator import AcceleratorShim
from trainer.hf.prediction import alone, measure_packs, predictions_of, run_evaluation_loop
from trainer.hf.search import Objective, Search
from trainer.hf.unsupported import UNSUPPORTED, check_overrides
from trainer.model.freezing import operations_per_input
from trainer.model.traits import ITEMS, LossFunction, count_labels, reads_argument, takes_argument
from trainer.optim.build import optimizer_class
from trainer.optim.groups import MATRIX_DIMENSIONS
from trainer.training.callbacks import RunState
from trainer.training.evaluate import PADDING
from trainer.training.model_task import ModelTask
from trainer.training.out_of_memory import memory_tracker
from trainer.training.scores import ScoreAnswers
from trainer.training.task import Task
from trainer.training.trainer import Callbacks, CoreTrainer

Callback: TypeAlias = TrainerCallback | type[TrainerCallback]
ComputeMetrics = Callable[..., dict[str, float]]


class Trainer(CoreTrainer):
    """Trains a model: a causal language model on packed token samples, or any module on any data set.

    Token data (a TokenStore, a JsonlDataset, or the file that data_path names) is packed. With it, what is not given is
    built from `args`: the model from model_name_or_path or model_config, the tokenizer likewise, the data from
    data_path. Any other data set is batched as transformers' Trainer does; the model is any module that returns a loss
    as `loss`, or as its first output.

    Args:
        model: a transformers causal LM, any module, or None.
        args: every option.
        data_collator: from a list of samples to the model's inputs; by default it stacks, and pads where there is a
            tokenizer. For custom data sets only.
        train_dataset: token data, or anything with samples: map-style, a stream, a datasets.Dataset.
        eval_dataset: the same for evaluation.
        processing_class: the tokenizer, or what else turns raw data into inputs.
        model_init: builds the model, anew for each `train`.
        compute_loss_func: from (outputs, labels, num_items_in_batch=) to the loss.
        compute_metrics, preprocess_logits_for_metrics: see transformers' Trainer.
        callbacks: transformers callbacks, called after the trainer's own.
        optimizers, optimizer_cls_and_kwargs, score_answers: see `CoreTrainer`, also for the errors raised.
    """

    from transformers.trainer_pt_utils import (
        get_learning_rates,
        get_num_trainable_parameters,
        get_optimizer_group,
        log_metrics,
        metrics_format,
        save_metrics,
        save_state,
    )

    create_model_card = hub.create_model_card
    init_hf_repo = hub.init_hf_repo
    push_to_hub = hub.push_to_hub

    is_deepspeed_enabled = is_fsdp_enabled = False  # by accelerate, which scripts ask for
    place_model_on_device = True
    loss_is_scaled_for_ga: bool | None = None  # whether an overridden compute_loss divides by num_items_in_batch
    hub_model_id: str | None = None  # the repository's whole name, once it is known to be there
    has_checkpoint_twins = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Collate | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: LossFunction | None = None,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: Callbacks | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        score_answers: ScoreAnswers | None = None,
    ) -> None:
        check_overrides(type(self), vars(self))
        self.model_init, self.compute_loss_func, self.compute_metrics = model_init, compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self._given_collator, self._trial = data_collator, None
        self._memory = memory_tracker(getattr(args, "skip_memory_metrics", True))
        self._memory.start()
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks or (),
            optimizers,
            optimizer_cls_and_kwargs,
            score_answers,
        )
        self.accelerator = AcceleratorShim(self)
        if self.args.push_to_hub:
            self.init_hf_repo()
        self._memory.stop_and_update_metrics()

    def build_task(self, model: nn.Module | None, train_dataset: Any, eval_dataset: Any, measure: Any = None) -> Task:
        """Token data is given, named by an option, or all that is left to be built from; anything else is custom."""
        has_path = self.args.data_path is not None or bool(self.args.data_mixture)
        is_to_build = (model is None and self.model_init is None) or has_path
        if is_token_data(train_dataset if train_dataset is not None else eval_dataset) or (
            train_dataset is None and is_to_build
        ):
            given = {
                "data_collator": self._given_collator,
                "model_init": self.model_init,
                "compute_loss_func": self.compute_loss_func,
                "preprocess_logits_for_metrics": None if self.compute_metrics else self.preprocess_logits_for_metrics,
            }
            names = [name for name, value in given.items() if value is not None]
            if names:
                raise UsageError(
                    f"{', '.join(names)} have no effect on token data: leave them out, or give another data set"
                )
            measure = partial(measure_packs, self) if self.compute_metrics is not None else None
            return super().build_task(model, train_dataset, eval_dataset, measure)
        if self.score_answers is not None:
            raise UsageError("score_answers scores chats that are token data: give compute_metrics")
        if (model is None) == (self.model_init is None):
            raise UsageError("give either model or model_init")
        if self.model_init is not None and self.optimizer is not None:
            raise UsageError(
                "optimizers hold the parameters of one model, and model_init builds it anew for each train(): override "
                "create_optimizer, or give optimizer_cls_and_kwargs"
            )
        task = ModelTask(
            self.args,
            self.group,
            self,
            self._given_collator,
            self.processing_class,
            train_dataset,
            eval_dataset,
            self.compute_loss_func,
        )
        self._use_model(task, self.call_model_init() if self.model_init is not None else model)
        return task

    def _use_model(self, task: ModelTask, model: Any) -> None:
        task.use_model(model)
        self.model_accepts_loss_kwargs = task.accepts_loss_kwargs
        self.label_names = task.traits.label_names

    def display(self) -> list[TrainerCallback]:
        """Return the callback that shows progress, as transformers' Trainer has it."""
        if self.task.collate is None:
            return []
        return [PrinterCallback() if self.args.disable_tqdm else ProgressCallback()]

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from the start, or from a checkpoint, to the end; see `CoreTrainer.train`.

        Args:
            trial: what `model_init` is given, if it takes an argument; see `hyperparameter_search`.
            ignore_keys_for_eval: outputs of the model that are not predictions, in evaluations while training.
        """
        check_overrides(type(self), vars(self))
        self._memory.start()
        self._trial, self._ignored_outputs = trial, ignore_keys_for_eval
        if isinstance(self.task, ModelTask):
            self.task.train_batch_size = self.args.per_device_train_batch_size
            if trial is not None and not self._has_trained:
                self.begin_anew()
        output = super().train(resume_from_checkpoint)
        self._memory.stop_and_update_metrics(output.metrics)
        return output

    def begin_anew(self) -> None:
        """Forget an earlier run; with model_init its model and optimizer too."""
        super().begin_anew()
        if self.model_init is not None and isinstance(self.task, ModelTask):
            set_seed(self.args.seed)
            self._use_model(self.task, self.call_model_init(self._trial))
            self.optimizer, self.lr_scheduler = None, None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build a model with `model_init`, for a trial where it takes one."""
        assert self.model_init is not None
        return self.model_init(trial) if inspect.signature(self.model_init).parameters else self.model_init()

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Mapping[str, Any]] | None = None,
        compute_objective: Objective | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **settings: Any,
    ) -> BestRun | list[BestRun]:
        """Train with many settings of options, chosen by optuna, each in a folder of its own; return the best.

        `settings` are those of optuna's create_study, and `timeout`, `gc_after_trial` and `catch` of its optimize.

        Raises:
            MissingPackageError: optuna is not installed.
            UsageError: there is no model_init, or another backend is asked for.
        """
        if backend not in (None, "optuna"):
            raise UsageError(f"backend = {backend}: only optuna is supported")
        search = Search(self, hp_space, compute_objective, hp_name)
        return search.run(n_trials, direction, **settings)

    # One micro-batch of a custom data set.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Add the gradient of one micro-batch; return its share of the loss of the global batch."""
        inputs = self._prepare_inputs(inputs)
        items: Any = {ITEMS: num_items_in_batch} if takes_argument(self.compute_loss, ITEMS) else {}
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, **items)
        is_divided = self.loss_is_scaled_for_ga
        if is_divided is None:
            is_divided = num_items_in_batch is not None and self._divides_by_items()
        loss = self._model_task.weigh(loss, is_divided=is_divided)
        self.backward(loss)
        return loss.detach()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Return the loss of a micro-batch, with the model's outputs if asked for.

        An override that does not divide by `num_items_in_batch` although the model takes it says so with
        `loss_is_scaled_for_ga = False`; one that divides although the model does not take it, with True.
        """
        task = self._model_task
        task.accepts_loss_kwargs, task.loss_function = self.model_accepts_loss_kwargs, self.compute_loss_func
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            num_items_in_batch = None  # nothing here would divide by it
        loss, outputs = task.compute_loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _divides_by_items(self) -> bool:
        """Return whether the loss of compute_loss is a sum divided by num_items_in_batch."""
        if self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            return True
        # The model does not. An override divides if it reads the number, unless it only hands it on.
        return type(self).compute_loss is not Trainer.compute_loss and reads_argument(self.compute_loss, ITEMS)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss; an override of `training_step` calls this."""
        (loss * self.scale.value if self.scale.is_on else loss).backward()

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Return the context in which losses are computed, in the dtype that the options say."""
        return self.task.prepared.compute_context()

    @property
    def _model_task(self) -> ModelTask:
        if not isinstance(self.task, ModelTask):
            raise UsageError("training_step and compute_loss are not called on token data, whose samples are packed")
        return self.task

    def _prepare_inputs(self, inputs: Any) -> Any:
        return to_device(inputs, self.group.device)

    # Evaluation and prediction.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the loss, and what else was asked for, on held-out samples; see `CoreTrainer.evaluate`."""
        self._memory.start()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._memory.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict every sample, and measure where there are labels.

        Returns:
            Predictions and labels as numpy arrays in the order of the data set, -100 where a row is narrower than
            others, nested as the model returns them; and metrics.
        """
        if not isinstance(self.task, ModelTask):
            raise UsageError(
                "predict needs a data set of your own, such as a list of {'input_ids': ..., 'labels': ...}: give one "
                "as eval_dataset to another Trainer; token data is packed, without a row of logits for each sample"
            )
        self._memory.start()
        started = perf_counter()
        loader = self.get_test_dataloader(test_dataset)
        output = self.evaluation_loop(loader, "Prediction", None, ignore_keys, metric_key_prefix)
        metrics = output.metrics | self.speed_metrics(metric_key_prefix, perf_counter() - started, output.num_samples)
        self.events.emit("on_predict", metrics=metrics)
        self._memory.stop_and_update_metrics(metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over all batches of a loader, on all ranks; `evaluate` and `predict` are built on it."""
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        return run_evaluation_loop(self, dataloader, description, loss_only, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Run the model on one batch; return loss, logits and labels, each None where absent or not asked for.

        Several outputs or several kinds of labels are tuples.
        """
        inputs = self._prepare_inputs(inputs)
        traits = self._model_task.traits
        labels = tuple(inputs.get(name) for name in self.label_names)
        has_labels = bool(labels) and all(label is not None for label in labels)
        with torch.no_grad(), self.compute_loss_context_manager():
            if has_labels or (not labels and inputs.get("return_loss", traits.can_return_loss)):
                count = count_labels(inputs, traits)
                num_items = None if count is None else torch.tensor(count, device=self.group.device)
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items)
                loss = loss.detach().mean()
            else:
                loss, outputs = None, model(**inputs)
        if prediction_loss_only:
            return loss, None, None
        logits = nested_detach(predictions_of(self.model, outputs, ignore_keys, has_loss=loss is not None))
        return loss, logits, alone(nested_detach(labels)) if has_labels else None

    def padding_of(self, rows: str) -> int:
        """Return what rows of this kind are padded with where others are wider."""
        return PADDING

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Build the loader of this rank's share of the samples to predict."""
        return self.get_eval_dataloader(test_dataset)

    # Weights out, and the hub.

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> Path:
        """Export weights, and config and tokenizer if any; by default into output_dir itself.

        With the option push_to_hub it is pushed, too.
        """
        directory = super().save_model(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(f"Step {self.state.global_step}")
        return directory

    # State and callbacks.

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a subclass with overrides that nothing would call."""
        super().__init_subclass__(**options)
        check_overrides(cls, {})

    def __getattr__(self, name: str) -> Any:
        """Say what to use instead of what transformers' Trainer has and this one has not."""
        found = inspect.getattr_static(type(self), name, None)
        if isinstance(found, property):
            # Python comes here when a property raises AttributeError: raise that error again.
            return found.__get__(self, type(self))
        advice = f"this Trainer has none: {UNSUPPORTED[name]}" if name in UNSUPPORTED else "there is no such attribute"
        raise AttributeError(f"{type(self).__name__}.{name}: {advice}")

    model_wrapped = CoreTrainer.model  # nothing wraps it

    @property
    def state(self) -> RunState:
        """Where the run stands, and what was logged."""
        return self.events.state

    @state.setter
    def state(self, state: RunState) -> None:
        self.events.state = state

    @property
    def control(self) -> TrainerControl:
        """What the callbacks ask for."""
        return self.events.control

    @control.setter
    def control(self, control: TrainerControl) -> None:
        self.events.control = control

    @property
    def callback_handler(self) -> CallbackHandler:
        """The callbacks that users add and remove."""
        return self.events.handler

    @property
    def data_collator(self) -> Any:
        """What makes a batch of samples, and may be set at any time; None where samples are packed."""
        return self.task.collate

    @data_collator.setter
    def data_collator(self, collate: Any) -> None:
        if not isinstance(self.task, ModelTask):
            raise UsageError("data_collator has no effect on token data: leave it out, or give another data set")
        self.task.use_collator(collate)

    def add_callback(self, callback: Callback) -> None:
        """Add a callback, given as object or class."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Callback) -> TrainerCallback | None:
        """Remove and return a callback, the first of its class where a class is given; None where there is none."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Callback) -> None:
        """Remove a callback, the first of its class where a class is given."""
        self.callback_handler.remove_callback(callback)

    @property
    def _train_batch_size(self) -> int:
        """Samples of one rank in one micro-batch, as found where auto_find_batch_size looked for it."""
        return self.state.train_batch_size

    def is_world_process_zero(self) -> bool:
        """Return whether this rank writes and prints for all."""
        return self.group.is_main

    def is_local_process_zero(self) -> bool:
        """Return whether this rank is the first of its node."""
        return self.group.topology.is_local_main

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Count the samples of a custom data set in one step over all ranks."""
        return self._train_batch_size * args.gradient_accumulation_steps * self.group.world_size

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Count a loader's samples, as far as its data set and its length tell."""
        dataset: Any = getattr(dataloader, "dataset", None)
        return len(dataset) if has_length(dataset) else len(dataloader) * self.args.per_device_train_batch_size

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Estimate the operations that training on a batch takes; `state.total_flos` counts them."""
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if main is None else int(operations_per_input(self.model) * main.numel())

    def end(self) -> None:
        """Leave the process group; no other method that ranks call together works afterwards."""
        self.group.close()

    # The optimizer.

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return class and settings of the optimizer that options name; some need the model to know them."""
        return optimizer_class(nn.Linear(1, 1) if model is None else model, args)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that weight_decay makes smaller: matrices, not norms and biases."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= MATRIX_DIMENSIONS]
