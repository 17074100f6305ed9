"""Scripts as users have them, run twice, with transformers' classes and with ours: same numbers, same events.

A script is a function of a library, which is transformers or this package. Dropout is 0 and the order sequential.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import TrainerCallback

import trainer as ours
from tests.fixtures.datasets import labelled_rows
from tests.fixtures.models import tiny_llama
from tests.fixtures.tolerances import SAME_LOSS, SAME_PREDICTIONS

OPTIONS = {
    "use_cpu": True,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 3,
}
Library = types.ModuleType


def arguments(library: Library, folder: Path, **options: Any) -> Any:
    if library is ours:
        options["export_final"] = False
    return library.TrainingArguments(str(folder / library.__name__), **{**OPTIONS, **options})


def bert(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(num_hidden_layers=1, **sizes, **dropouts, **options)
    return getattr(transformers, f"BertFor{kind}")(config)


class Events(TrainerCallback):
    """Writes down the events, and the step of each."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, control, **_: self.seen.append((name, state.global_step))
        return super().__getattribute__(name)


def accuracy(found: Any) -> dict[str, float]:
    predicted, labels = np.argmax(found.predictions, axis=-1), found.label_ids
    is_labelled = labels != -100
    return {"accuracy": float((predicted == labels)[is_labelled].mean())}


def causal_language_model(library: Library, folder: Path, events: Events) -> Any:
    """run_clm: blocks of tokens, gradient accumulation, warm-up, evaluation after each epoch."""
    rows = labelled_rows(16)
    options = {"gradient_accumulation_steps": 2, "warmup_steps": 1, "lr_scheduler_type": "cosine"}
    args = arguments(library, folder, eval_strategy="epoch", **options)
    return library.Trainer(tiny_llama(), args, train_dataset=rows, eval_dataset=rows[:6], callbacks=[events])


def text_classification(library: Library, folder: Path, events: Events) -> Any:
    """run_glue: labels of whole rows, accuracy, the best model at the end."""
    rows = [{"input_ids": row["input_ids"], "label": i % 3} for i, row in enumerate(labelled_rows(16))]
    options = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    return library.Trainer(
        bert("SequenceClassification", num_labels=3),
        arguments(library, folder, **options, **best),
        train_dataset=rows,
        eval_dataset=rows[:6],
        compute_metrics=accuracy,
        callbacks=[events],
    )


def token_classification(library: Library, folder: Path, events: Events) -> Any:
    """run_ner: a label for each token, some of them -100."""
    rows = []
    for row in labelled_rows(16):
        labels = [-100 if token % 4 == 0 else int(token) % 3 for token in row["input_ids"]]
        rows.append({"input_ids": row["input_ids"], "labels": labels})
    return library.Trainer(
        bert("TokenClassification", num_labels=3),
        arguments(library, folder, max_grad_norm=0.5),
        train_dataset=rows,
        eval_dataset=rows[:6],
        compute_metrics=accuracy,
        callbacks=[events],
    )


SCRIPTS: Sequence[Callable[[Library, Path, Events], Any]] = (
    causal_language_model,
    text_classification,
    token_classification,
)
NUMBERS = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "epoch")


def numbers(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    lines = [{name: line[name] for name in (*NUMBERS, "step") if name in line} for line in history]
    return [line for line in lines if len(line) > 2]  # the last line has times alone


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_script_does_what_it_does_with_transformers(tmp_path: Path, script: Any) -> None:
    found: list[Any] = []
    for library in (transformers, ours):
        events = Events()
        trained = script(library, tmp_path, events)
        output = trained.train()
        trained.compute_metrics = None
        predicted = trained.predict(trained.eval_dataset)
        found.append((trained.state, output, predicted, events.seen, trained))
    (state, output, predicted, events, _), (our_state, our_output, our_predicted, our_events, _) = found
    theirs, mine = numbers(state.log_history), numbers(our_state.log_history)
    assert len(mine) == len(theirs)
    for line, expected in zip(mine, theirs, strict=True):
        assert line == pytest.approx(expected, rel=SAME_LOSS)
    assert our_output.training_loss == pytest.approx(output.training_loss, rel=SAME_LOSS)
    np.testing.assert_allclose(our_predicted.predictions, predicted.predictions, rtol=0, atol=SAME_PREDICTIONS)
    if state.best_metric is not None:  # there only where an option depends on it
        assert our_state.best_metric == pytest.approx(state.best_metric, rel=SAME_LOSS)
    assert our_events == events
