"""Scripts as users have them, run twice, with transformers' classes and with ours: same numbers, same events.

A script is a function of a library, which is transformers or this package. Dropout is 0, the order sequential, and
models are in float64: in float32 the number of threads moves losses by 1e-5.
"""

from __future__ import annotations

import os
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
from tests.fixtures.models import build_seq2seq_model, tiny_llama
from tests.fixtures.ranks.launch import Launch
from tests.fixtures.tolerances import SAME_LOSS, SAME_PREDICTIONS

OPTIONS = {
    "use_cpu": True,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "per_device_eval_batch_size": 8,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 3,
}
Library = types.ModuleType


def arguments(library: Library, folder: Path, **options: Any) -> Any:
    # 4 samples a micro-batch, over all ranks.
    sizes = {"per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1"))}
    kind = library.Seq2SeqTrainingArguments if "predict_with_generate" in options else library.TrainingArguments
    if library is ours:
        options["export_final"] = False
    return kind(str(folder / library.__name__), **{**OPTIONS, **sizes, **options})


def bert(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(num_hidden_layers=1, **sizes, **dropouts, **options)
    return getattr(transformers, f"BertFor{kind}")(config).double()


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
    return library.Trainer(tiny_llama().double(), args, train_dataset=rows, eval_dataset=rows[:6], callbacks=[events])


def summarisation(library: Library, folder: Path, events: Events) -> Any:
    """run_summarization: an encoder-decoder whose answers are generated and measured."""
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"][:6]} for row in labelled_rows(12)]

    def exact(found: Any) -> dict[str, float]:
        return {"ones": float((found.predictions == 1).mean())}

    options: dict[str, Any] = {"weight_decay": 0.0}  # T5's attention biases are matrices, and decay here
    options |= {"predict_with_generate": True, "generation_max_length": 8, "eval_strategy": "steps", "eval_steps": 2}
    return library.Seq2SeqTrainer(
        build_seq2seq_model("t5").double(),
        arguments(library, folder, **options),
        train_dataset=rows,
        eval_dataset=rows[:5],
        compute_metrics=exact,
        callbacks=[events],
    )


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


def question_answering(library: Library, folder: Path, events: Events) -> Any:
    """run_qa: a subclass that evaluates without metrics, and measures what it makes of the predictions."""

    class QuestionAnsweringTrainer(library.Trainer):  # type: ignore[name-defined]
        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            loader = self.get_eval_dataloader(self.eval_dataset if eval_dataset is None else eval_dataset)
            compute_metrics, self.compute_metrics = self.compute_metrics, None
            try:
                output = self.evaluation_loop(
                    loader, description="Evaluation", prediction_loss_only=compute_metrics is None
                )
            finally:
                self.compute_metrics = compute_metrics
            starts, ends = (np.argmax(logits, axis=-1) for logits in output.predictions[:2])
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in compute_metrics((starts, ends)).items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    rows = []
    for i, row in enumerate(labelled_rows(16)):
        rows.append({"input_ids": row["input_ids"], "start_positions": i % 5, "end_positions": 5 + i % 4})
    return QuestionAnsweringTrainer(
        bert("QuestionAnswering"),
        arguments(library, folder, eval_strategy="steps", eval_steps=1),
        train_dataset=rows,
        eval_dataset=rows[:6],
        compute_metrics=lambda spans: {"length": float(np.mean(spans[1] - spans[0]))},
        callbacks=[events],
    )


SCRIPTS: Sequence[Callable[[Library, Path, Events], Any]] = (
    causal_language_model,
    summarisation,
    text_classification,
    token_classification,
    question_answering,
)
NUMBERS = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "eval_length", "eval_ones", "epoch")


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
    for array, expected in zip(leaves(our_predicted.predictions), leaves(predicted.predictions), strict=True):
        if array.dtype.kind == "i":  # generated; there padded to the model's max_length, whatever was asked for
            assert not expected[:, array.shape[1] :].any()
            expected = expected[:, : array.shape[1]]
        np.testing.assert_allclose(array, expected, rtol=0, atol=SAME_PREDICTIONS)
    if state.best_metric is not None:  # there only where an option depends on it
        assert our_state.best_metric == pytest.approx(state.best_metric, rel=SAME_LOSS)
    assert our_events == events


def leaves(predictions: Any) -> list[Any]:
    return list(predictions) if isinstance(predictions, tuple) else [predictions]


def run_ours(folder: Path, number: int) -> tuple[list[dict[str, float]], list[Any]]:
    trained = SCRIPTS[number](ours, folder, Events())
    trained.train()
    trained.compute_metrics = None
    predicted = leaves(trained.predict(trained.eval_dataset).predictions)
    trained.group.close()
    return numbers(trained.state.log_history), predicted


@pytest.mark.parametrize("number", range(len(SCRIPTS)), ids=[script.__name__ for script in SCRIPTS])
def test_a_script_does_on_two_ranks_what_it_does_on_one(launch: Launch, tmp_path: Path, number: int) -> None:
    (alone,) = launch(1, run_ours, tmp_path / "alone", number).values
    expected, expected_predictions = alone
    for lines, predictions in launch(2, run_ours, tmp_path / "together", number).values:
        assert len(lines) == len(expected)
        for line, other in zip(lines, expected, strict=True):
            assert line == pytest.approx(other, rel=SAME_LOSS)
        for array, other in zip(predictions, expected_predictions, strict=True):
            np.testing.assert_allclose(array, other, rtol=0, atol=SAME_PREDICTIONS)


class Crash(TrainerCallback):
    """A machine that fails in the middle of a run."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise OSError("the machine fails")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_adapters_are_trained_resumed_exported_and_loaded_as_with_transformers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rows, found = labelled_rows(16), []

    def build(library: Library, **more: Any) -> Any:
        torch.manual_seed(0)  # of the adapters
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        model = peft.get_peft_model(tiny_llama().double(), config)
        return library.Trainer(model, arguments(library, tmp_path, **options), train_dataset=rows, **more)

    for library in (transformers, ours):
        with pytest.raises(OSError, match="the machine fails"):
            build(library, callbacks=[Crash()]).train()
        resumed = build(library)
        resumed.train(resume_from_checkpoint=True)
        folder = tmp_path / f"{library.__name__}-adapters"
        resumed.save_model(str(folder))
        loaded = peft.PeftModel.from_pretrained(tiny_llama().double(), folder)
        ids = torch.tensor([rows[0]["input_ids"]])
        with torch.no_grad():
            logits = resumed.model.eval()(ids).logits
            assert torch.equal(loaded.eval()(ids).logits, logits)
        found.append((numbers(resumed.state.log_history), logits))
    (theirs, logits), (mine, our_logits) = found
    assert [line["step"] for line in mine] == [1, 2, 3, 4]
    for line, expected in zip(mine, theirs, strict=True):
        assert line == pytest.approx(expected, rel=SAME_LOSS)
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=SAME_PREDICTIONS)
