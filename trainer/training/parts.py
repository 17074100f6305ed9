"""What users of a Trainer override: loaders, optimizer, schedule, one micro-batch's step, its loss, a line of the log.

Knows how each is made from the options; the order in which they are called is the Trainer's and the loop's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from trainer.errors import UsageError
from trainer.model.traits import LossFunction, LossRule, find_loss
from trainer.optim.groups import parameter_groups
from trainer.optim.optimizers import build_optimizer
from trainer.optim.scaling import LossScale
from trainer.optim.schedules import build_schedule
from trainer.training.accelerator import AcceleratorWords
from trainer.training.evaluation import more_is_better
from trainer.training.prediction import TrainerPrediction
from trainer.training.step import to_device


class TrainerParts(TrainerPrediction):
    """The parts of a Trainer that are made to be replaced."""

    loss_is_scaled_for_ga: bool | None = None  # whether an overridden compute_loss divides by num_items_in_batch

    road: Any  # TokenRoad or OrdinaryRoad
    train_dataset: Any
    eval_dataset: Any
    lr_scheduler: LRScheduler | None
    optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None
    compute_loss_func: LossFunction | None
    model_accepts_loss_kwargs: bool
    accelerator: AcceleratorWords
    _scale: LossScale
    _made_schedule = False  # by us, not given

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Build the loader of training data: of this rank's micro-batches, for token data of its global batches."""
        if self.train_dataset is None:
            raise UsageError("nothing to train on: give train_dataset")
        return self.road.train_loader(self.train_dataset)

    def create_optimizer_and_scheduler(self, num_training_steps: int | None) -> None:
        """Make the optimizer and its schedule, where they were not given."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer that the options name, or that `optimizer_cls_and_kwargs` gives, if there is none yet."""
        model = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            kind: Any
            kind, settings = self.optimizer_cls_and_kwargs
            is_class = isinstance(kind, type) and issubclass(kind, Optimizer)
            make, held = (kind, parameter_groups(model, self.args)) if is_class else (kind(), model)
            self.optimizer = make(held, **settings)
        elif self.optimizer is None:
            self.optimizer = build_optimizer(model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int | None, optimizer: Optimizer | None = None) -> LRScheduler:
        """Make the learning-rate schedule that the options name, if none was given."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            self.lr_scheduler = build_schedule(optimizer, self.args, num_training_steps, more_is_better(self.args))
            self._made_schedule = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Add the gradient of one micro-batch of ordinary data; gives its share of the loss of the global batch."""
        inputs = to_device(inputs, self.group.device)
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            num_items_in_batch = None  # nobody would divide by it
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        is_divided = self.loss_is_scaled_for_ga
        if is_divided is None:
            is_divided = num_items_in_batch is not None
        loss = self.road.objective.weigh(loss, is_divided=is_divided)
        self.backward(loss)
        return loss.detach()

    def _micro_batch(self, *given: Any) -> Tensor:
        """Give this rank's share of the loss; what went through the accelerator is a mean over this rank alone."""
        self.accelerator.has_averaged = False
        loss = self.training_step(*given)
        return loss / self.group.world_size if self.accelerator.has_averaged else loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss; what overrides `training_step` calls this."""
        (loss * self._scale.value if self._scale.is_on else loss).backward()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Give the loss of a micro-batch of ordinary data, with the model's outputs if asked for.

        An override that does not divide by `num_items_in_batch` although the model takes it says so with
        `loss_is_scaled_for_ga = False`.
        """
        smoothing = self.args.label_smoothing_factor
        rule = LossRule(self.road.traits, self.model_accepts_loss_kwargs, self.compute_loss_func, smoothing)
        loss, outputs = find_loss(model, inputs, num_items_in_batch, rule)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add a line to the log history, with epoch and step, and tell the callbacks."""
        logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.events.emit("on_log", logs=logs)
