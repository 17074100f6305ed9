"""What is trained, as the step, the loop and the trainer know it; they never ask which kind it is.

`PackedTask` (packed_task.py) is token data. `ModelTask` (model_task.py) is any module on any data set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer.data.length import RunLength
from trainer.model.osft.layers import Osft
from trainer.model.prepared import Prepared
from trainer.training.generate import Answer
from trainer.training.metrics import BatchCounts

GlobalBatch = Any  # this rank's share of one, as its task knows it


class Batches(Protocol):
    """Where global batches come from."""

    num_samples: int | None  # of an epoch, over all ranks; None: not known before one has ended
    samples_per_step: int

    def epoch(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        """Return what is left of an epoch after `start` of its samples."""

    def position(self) -> Any:
        """Return where a stream stands, as plain values, if it says so; None: epoch and samples say it all."""

    def move_to(self, position: Any) -> None:
        """Have the next epoch continue from what `position` returned."""


class Task(Protocol):
    """What is trained."""

    model: Any
    prepared: Prepared
    osft: Osft | None
    train_dataset: Any
    eval_dataset: Any
    train_batch_size: int  # as TrainerState.train_batch_size tells it
    processing_class: Any  # the tokenizer, or what else turns raw data into inputs
    collate: Any  # makes a micro-batch of samples; None where samples are packed
    answers: dict[int, list[Answer]]  # step -> answers of the evaluation after it
    saves_asynchronously: bool  # by default
    keeps_older_runs: bool  # puts an older run in output_dir aside, as transformers does, instead of refusing
    more_metrics: Collection[str]  # names of what `backward` measures besides `loss`

    def train_loader(self, dataset: Any) -> DataLoader[Any]:
        """Build the loader of this rank's share of the training data."""

    def eval_loader(self, dataset: Any) -> DataLoader[Any]:
        """Build the loader of this rank's share of held-out data."""

    def train_batches(self, loader: DataLoader[Any]) -> Batches:
        """Return the global batches of a loader, ours or a user's."""

    def length(self, batches: Any) -> RunLength:
        """Plan the number of steps."""

    def counts(self, batch: GlobalBatch) -> BatchCounts:
        """Count what a batch holds over all ranks."""

    def backward(self, batch: GlobalBatch, i: int) -> dict[str, Tensor]:
        """Add the gradient of micro-batch i of this rank.

        Every rank has equally many.

        Returns:
            `loss`, this rank's share of the mean loss: the shares of all micro-batches and ranks sum to it. The same
            for each of `more_metrics`.
        """

    def evaluate(
        self, dataset: Any, loader: DataLoader[Any], step: int, prefix: str, ignore_keys: list[str] | None
    ) -> tuple[dict[str, float], int]:
        """Measure a held-out data set; return metrics named with the prefix, and the number of its samples."""

    def num_eval_batches(self, num_samples: int) -> int:
        """Count the global batches that so many held-out samples make."""

    def describe(self) -> list[str]:
        """Return lines about data and model for the log of the start."""


def describe_model(model: nn.Module) -> str:
    """Return a line about a model's parameters for the log of the start."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = num_trained / max(num_parameters, 1)
    return f"model: {type(model).__name__}, {num_parameters:,} parameters, {share:.1%} of them trained"
