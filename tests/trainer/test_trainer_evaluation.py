"""Evaluation and prediction: every sample once, in order, with the numbers that one process and one batch give."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from tests.fixtures.datasets import DynamicShapesDataset, RegressionDataset, SampleIterableDataset
from tests.fixtures.models import build_model, build_seq2seq_model, tiny_llama
from tests.fixtures.regression import RegressionModel
from tests.fixtures.runs import random_token_samples, read_metrics
from tests.fixtures.sequences import VOCABULARY, pad_sequences, sequence_task
from tests.fixtures.tolerances import CLOSED_FORM_FP32, LAYOUT_FP32, SAME_PREDICTIONS
from tests.trainer.trainer_test_utils import get_regression_trainer
from trainer.config.arguments import TrainingArguments
from trainer.data.store import TokenStore
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer

A, B = 1.5, 2.5
LENGTHS = (32, 33, 5, 1)  # a multiple of the batch, not one, fewer than a batch, fewer than ranks
BATCHES = (4, 100)


class Near:
    """Share of predictions near their labels; also batch by batch."""

    def __init__(self, threshold: float = 0.25) -> None:
        self.threshold = threshold
        self.calls: list[tuple[int, bool | None]] = []
        self._hits = self._total = 0

    def __call__(self, prediction: Any, compute_result: bool | None = None) -> dict[str, float] | None:
        predictions, labels = (first(part) for part in list(prediction)[:2])
        self.calls.append((len(labels), compute_result))
        hits = int((abs(predictions - labels) <= self.threshold).sum())
        if compute_result is None:
            return {"accuracy": hits / len(labels)}
        self._hits, self._total = self._hits + hits, self._total + len(labels)
        return {"accuracy": self._hits / self._total} if compute_result else None


def first(values: Any) -> Any:
    return values[0] if isinstance(values, tuple) else values


def expected(dataset: RegressionDataset, shift: float = 0.0) -> tuple[np.ndarray, float, float]:
    """Predictions, loss and accuracy by hand, in float64."""
    y = A * dataset.x.astype(np.float64) + B
    return y, float(np.mean((y - dataset.ys[0]) ** 2)), float(np.mean(abs(y + shift - dataset.ys[0]) <= 0.25))


def check(results: dict[str, float], dataset: RegressionDataset, prefix: str = "eval", shift: float = 0.0) -> None:
    _, loss, accuracy = expected(dataset, shift)
    assert results[f"{prefix}_loss"] == pytest.approx(loss, rel=CLOSED_FORM_FP32)
    assert results[f"{prefix}_accuracy"] == accuracy
    for name in ("runtime", "samples_per_second", "steps_per_second"):
        assert results[f"{prefix}_{name}"] > 0


def build(tmp_path: Path, **options: Any) -> Trainer:
    return get_regression_trainer(a=A, b=B, output_dir=tmp_path, **{"compute_metrics": Near(), **options})


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.parametrize("batched", [False, True])
def test_no_layout_shows_in_a_number(ranks: Any, tmp_path: Path, batched: bool) -> None:
    for length in LENGTHS:
        for size in BATCHES:
            trainer = build(tmp_path, eval_len=length, per_device_eval_batch_size=size, batch_eval_metrics=batched)
            check(trainer.evaluate(), trainer.eval_dataset)
            calls = trainer.compute_metrics.calls
            assert sum(count for count, _ in calls) == length
            assert [is_last for _, is_last in calls] == ([False] * (len(calls) - 1) + [True] if batched else [None])
            predicted = trainer.predict(trainer.eval_dataset)
            np.testing.assert_allclose(predicted.predictions, expected(trainer.eval_dataset)[0], rtol=CLOSED_FORM_FP32)
            np.testing.assert_array_equal(predicted.label_ids, trainer.eval_dataset.ys[0])
            check(predicted.metrics, trainer.eval_dataset, "test")


@pytest.mark.world_size(1, 2)
def test_a_stream_gives_the_same(ranks: Any, tmp_path: Path) -> None:
    for size in (4, 100):
        stream = SampleIterableDataset(length=33)
        trainer = build(tmp_path, eval_dataset=stream, per_device_eval_batch_size=size)
        check(trainer.evaluate(), stream.dataset)
        predicted = trainer.predict(stream)
        np.testing.assert_array_equal(predicted.label_ids, stream.dataset.ys[0])
        check(predicted.metrics, stream.dataset, "test")


@pytest.mark.world_size(1, 2)
def test_rows_of_many_widths_are_padded_with_minus_100(ranks: Any, tmp_path: Path) -> None:
    dataset = DynamicShapesDataset(length=40, batch_size=8)
    trainer = build(tmp_path, eval_dataset=dataset, compute_metrics=None)
    predicted = trainer.predict(dataset)
    for i, (x, y) in enumerate(zip(dataset.xs, dataset.ys, strict=True)):
        rest = np.full(predicted.predictions.shape[1] - len(x), -100)
        np.testing.assert_allclose(predicted.predictions[i], [*(A * x + B), *rest], rtol=CLOSED_FORM_FP32)
        np.testing.assert_array_equal(predicted.label_ids[i], [*y, *rest])
    by_hand = [(A * x + B - y) ** 2 for x, y in zip(dataset.xs, dataset.ys, strict=True)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.concatenate(by_hand).mean(), rel=CLOSED_FORM_FP32)


def token_loss(dataset: list[dict[str, Any]], model: nn.Module) -> float:
    """Mean cross-entropy over all labels, sample by sample."""
    total, count = 0.0, 0
    for sample in dataset:
        inputs = {name: torch.tensor([values]) for name, values in sample.items()}
        with torch.no_grad():
            total += model(**inputs).loss.item() * len(sample["labels"])
        count += len(sample["labels"])
    return total / count


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_loss_over_tokens_is_that_of_each_sample_alone(ranks: Any, tmp_path: Path, name: str) -> None:
    model, dataset = build_seq2seq_model(name, vocab_size=VOCABULARY), sequence_task()[1][:21]
    wanted = ranks.once(lambda: token_loss(dataset, model))
    for size in (1, 4, 50):
        args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=size, export_final=False)
        trainer = Trainer(model, args, pad_sequences, eval_dataset=dataset)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=LAYOUT_FP32)


@pytest.mark.world_size(1, 2)
def test_several_outputs_and_labels(ranks: Any, tmp_path: Path) -> None:
    for names in (None, ["labels", "labels_2"]):
        trainer = build(tmp_path, double_output=True, label_names=names, eval_len=13)
        dataset = trainer.eval_dataset
        check(trainer.evaluate(), dataset)
        predicted = trainer.predict(dataset)
        assert len(predicted.predictions) == 2
        for part in predicted.predictions:
            np.testing.assert_allclose(part, expected(dataset)[0], rtol=CLOSED_FORM_FP32)
        labels = predicted.label_ids if names else (predicted.label_ids,)
        np.testing.assert_array_equal(labels, dataset.ys)


def test_logits_are_changed_before_they_are_measured(tmp_path: Path) -> None:
    trainer = build(tmp_path, preprocess_logits_for_metrics=lambda logits, labels: logits + labels.sign().abs())
    check(trainer.evaluate(), trainer.eval_dataset, shift=1)


class DictModel(RegressionModel):
    """Names its outputs; two of them."""

    main_input_name = "input_x"

    def forward(self, input_x: torch.Tensor, labels: Any = None, **others: Any) -> Any:  # type: ignore[override]
        outputs = super().forward(input_x, labels)
        named = {"half": outputs[-1] / 2, "y": outputs[-1]}
        return named if labels is None else {"loss": outputs[0], **named}


def test_outputs_are_left_out_by_name(tmp_path: Path) -> None:
    trainer = build(tmp_path, model=DictModel(A, B))
    y = expected(trainer.eval_dataset)[0]
    np.testing.assert_allclose(trainer.predict(trainer.eval_dataset).predictions, [y / 2, y], rtol=CLOSED_FORM_FP32)
    check(trainer.evaluate(ignore_keys=["half"]), trainer.eval_dataset)
    only = trainer.predict(trainer.eval_dataset, ignore_keys=["half"], metric_key_prefix="held")
    np.testing.assert_allclose(only.predictions, y, rtol=CLOSED_FORM_FP32)
    check(only.metrics, trainer.eval_dataset, "held")


@pytest.mark.world_size(1, 2)
def test_metrics_see_inputs_and_losses_when_asked(ranks: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    for names in (["inputs"], ["loss"], ["inputs", "loss"], []):
        trainer = build(
            tmp_path,
            model=DictModel(A, B),
            include_for_metrics=names,
            eval_len=13,
            compute_metrics=lambda prediction: seen.append(prediction) or {},
        )
        results = trainer.evaluate()
        inputs, losses = seen[-1].inputs, seen[-1].losses
        assert (inputs is None, losses is None) == ("inputs" not in names, "loss" not in names)
        if inputs is not None:
            np.testing.assert_array_equal(inputs, trainer.eval_dataset.x)
        if losses is not None:
            assert losses.shape == (13,)
            assert losses.mean() == pytest.approx(results["eval_loss"], rel=CLOSED_FORM_FP32)


@pytest.mark.parametrize("every", [1, 3, None])
def test_the_place_where_predictions_wait_does_not_change_them(tmp_path: Path, every: int | None) -> None:
    trainer = build(tmp_path, eval_accumulation_steps=every, per_device_eval_batch_size=4, eval_len=30)
    check(trainer.evaluate(), trainer.eval_dataset)
    apart = build(
        tmp_path,
        eval_do_concat_batches=False,
        eval_accumulation_steps=every,
        per_device_eval_batch_size=4,
        eval_len=30,
        compute_metrics=None,
    ).predict(trainer.eval_dataset)
    assert [len(part) for part in apart.predictions] == [4] * 7 + [2]
    np.testing.assert_array_equal(np.concatenate(apart.label_ids), trainer.eval_dataset.ys[0])


def test_the_loss_alone_leaves_no_predictions(tmp_path: Path) -> None:
    trainer = build(tmp_path, prediction_loss_only=True)
    results = trainer.evaluate()
    assert results["eval_loss"] == pytest.approx(expected(trainer.eval_dataset)[1], rel=CLOSED_FORM_FP32)
    assert "eval_accuracy" not in results
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions is None
    assert predicted.label_ids is None


def test_samples_without_labels_are_predicted_but_not_measured(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    bare = [{"input_x": x} for x in trainer.eval_dataset.x]
    predicted = trainer.predict(bare)
    np.testing.assert_allclose(predicted.predictions, expected(trainer.eval_dataset)[0], rtol=CLOSED_FORM_FP32)
    assert predicted.label_ids is None
    assert set(predicted.metrics) == {"test_runtime", "test_samples_per_second", "test_steps_per_second"}
    with pytest.raises(UsageError, match="compute_metrics was never called: no batch .* labels named labels"):
        trainer.evaluate(bare)


def test_several_data_sets_have_names(tmp_path: Path) -> None:
    data = {"near": RegressionDataset(length=20), "far": RegressionDataset(length=9, seed=1)}
    options = {"eval_dataset": data, "eval_strategy": "epoch", "num_train_epochs": 1, "export_best": True}
    trainer = build(tmp_path, metric_for_best_model="eval_far_loss", learning_rate=0.1, **options)
    results = trainer.evaluate()
    for name, dataset in data.items():
        check(results, dataset, f"eval_{name}")
    check(trainer.evaluate({"other": data["far"]}), data["far"], "eval_other")
    check(trainer.evaluate("far", metric_key_prefix="eval_far"), data["far"], "eval_far")
    trainer.train()
    logged = [line["eval_far_loss"] for line in trainer.state.log_history if "eval_far_loss" in line]
    assert trainer.state.best_metric == logged[-1] != logged[0]
    assert Path(trainer.state.best_model_checkpoint).is_dir()


def test_a_metric_that_nothing_measures_is_an_error(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_strategy="epoch", metric_for_best_model="bleu", max_steps=1)
    with pytest.raises(UsageError, match="metric_for_best_model = 'bleu': measured are .*eval_accuracy"):
        trainer.train()


class Overriding(Trainer):
    """Overrides each method that others build on, and notes that it was called."""

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logits + 1, labels

    def evaluation_loop(self, dataloader: DataLoader[Any], description: str, *args: Any, **options: Any) -> Any:
        output = super().evaluation_loop(dataloader, description, *args, **options)
        return output._replace(metrics={**output.metrics, "described": description})

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        loader = super().get_eval_dataloader(eval_dataset)
        return TwiceLoader(loader) if eval_dataset is None else loader

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **options), "was_here": 1}


class TwiceLoader:
    """Not a DataLoader at all: another loader's batches, twice."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader
        yield from self.loader


def test_every_part_can_be_overridden(tmp_path: Path) -> None:
    trainer = build(tmp_path, trainer_class=Overriding, eval_strategy="epoch", num_train_epochs=1, eval_len=12)
    results = trainer.evaluate()
    _, loss, accuracy = expected(trainer.eval_dataset, shift=1)
    assert (results["was_here"], results["described"]) == (1, "Evaluation")
    assert results["eval_accuracy"] == accuracy
    assert results["eval_loss"] == pytest.approx(loss, rel=CLOSED_FORM_FP32)
    assert trainer.compute_metrics.calls == [(24, None)]
    assert trainer.predict(trainer.eval_dataset).metrics["described"] == "Prediction"
    trainer.train()
    assert trainer.state.log_history[-2]["described"] == "Evaluation"


def evaluated_at(trainer: Trainer) -> list[int]:
    trainer.train()
    return [line["step"] for line in trainer.state.log_history if "eval_loss" in line]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}, [0, 3, 6, 8]),
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 4}, [6, 8]),
        ({"eval_strategy": "steps", "logging_steps": 4}, [4, 8]),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, [4, 8]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [8]),
        ({"eval_strategy": "epoch", "eval_delay": 1.5}, [8]),
    ],
    ids=str,
)
def test_evaluation_is_due_when_the_options_say(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    trainer = build(tmp_path, num_train_epochs=2, train_len=32, **options)
    assert evaluated_at(trainer) == steps


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluating_in_half_precision_leaves_the_weights_alone(tmp_path: Path, option: str) -> None:
    class Watching(RegressionModel):
        def forward(self, input_x: torch.Tensor, labels: Any = None, **others: Any) -> Any:
            seen.append(self.a.dtype)
            return super().forward(input_x, labels)

    seen: list[torch.dtype] = []
    model = Watching(0.1, 0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = build(tmp_path, model=model, **{option: True})
    trainer.evaluate()
    assert set(seen) == {torch.bfloat16 if option.startswith("bf16") else torch.float16}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen.clear()
    trainer.train()
    assert set(seen) == {torch.float32}


@pytest.mark.world_size(2)
def test_shards_are_not_cast(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="several ranks hold shards: say bf16"):
        build(tmp_path, bf16_full_eval=True)


def test_nothing_is_dropped_from_an_evaluation(tmp_path: Path) -> None:
    trainer = build(tmp_path, dataloader_drop_last=True, eval_len=13)
    check(trainer.evaluate(), trainer.eval_dataset)


def test_a_step_and_a_prediction_have_the_same_loss(tmp_path: Path) -> None:
    model = build_seq2seq_model("bart", vocab_size=VOCABULARY)
    inputs = pad_sequences(sequence_task()[1][:5])
    trainer = Trainer(model, TrainingArguments(str(tmp_path)), pad_sequences)
    predicted = trainer.prediction_step(model, inputs, prediction_loss_only=True)[0]
    with torch.no_grad():
        assert predicted.item() == model(**inputs).loss.item()


def test_transformers_gives_the_same(tmp_path: Path) -> None:
    dataset = RegressionDataset(length=66)
    theirs = transformers.Trainer(
        RegressionModel(A, B),
        transformers.TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True),
        eval_dataset=dataset,
        compute_metrics=Near(),
    )
    ours = build(tmp_path, eval_dataset=dataset, model=RegressionModel(A, B))
    results, wanted = ours.evaluate(), theirs.evaluate()
    assert results["eval_accuracy"] == wanted["eval_accuracy"]
    assert results["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=CLOSED_FORM_FP32)
    assert set(wanted) - set(results) == {"eval_model_preparation_time"}
    np.testing.assert_array_equal(ours.predict(dataset).predictions, theirs.predict(dataset).predictions)


def test_token_data_has_no_rows_to_predict(tmp_path: Path) -> None:
    from tests.fixtures.runs import build_trainer, random_token_samples

    trainer = build_trainer(tmp_path, random_token_samples([5, 6]))
    with pytest.raises(UsageError, match="predict needs a data set of your own"):
        trainer.predict([{"input_ids": [1, 2], "labels": [1, 2]}])


def test_a_metric_may_be_an_array(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_strategy="epoch", compute_metrics=lambda _: {"each": np.array([0.5, 0.75])})
    trainer.train()
    assert read_metrics(tmp_path)[-1]["eval_each"] == [0.5, 0.75]


def test_what_metrics_may_see_is_named_in_the_error() -> None:
    with pytest.raises(UsageError, match="'input'.*allowed are inputs and loss"):
        TrainingArguments(include_for_metrics=["input"])


TOKEN_SAMPLES = random_token_samples((9, 3, 17, 5, 30, 2, 11, 7, 24))


@pytest.mark.world_size(1, 2, 4)
@pytest.mark.parametrize("budget", [30, 64])
@pytest.mark.parametrize("has_preprocess", [False, True], ids=["logits", "preprocessed"])
def test_packed_samples_are_measured_as_rows_are(ranks: Any, tmp_path: Path, budget: int, has_preprocess: bool) -> None:
    seen: list[Any] = []

    def measure(found: Any) -> dict[str, float]:
        seen.append((found.predictions, found.label_ids))
        return {"share": float(np.mean(found.label_ids[:, 1:] != -100)), "eval_own": 1.0}

    more: dict[str, Any] = {"compute_metrics": measure}
    if has_preprocess:
        more["preprocess_logits_for_metrics"] = lambda logits, labels: (logits.argmax(-1), logits.amax(-1))
    store = TokenStore.from_samples(TOKEN_SAMPLES)
    args = TrainingArguments(str(tmp_path), use_cpu=True, batch_size=4, max_tokens_per_rank=budget)
    packed = Trainer(tiny_llama(), args, train_dataset=store, eval_dataset=store, **more).evaluate()
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in TOKEN_SAMPLES]
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=1)
    by_rows = Trainer(tiny_llama(), args, eval_dataset=rows, **more).evaluate()
    (found, labels), (expected, expected_labels) = seen
    assert packed["eval_share"] == by_rows["eval_share"]
    assert packed["eval_own"] == by_rows["eval_own"] == 1.0
    # Nothing is trained across a border: the first label of a packed sample, which no row counts either, is left out.
    assert np.array_equal(labels[:, 1:], expected_labels[:, 1:])
    assert (labels[:, 0] == -100).all()
    for one, other in zip(
        found if has_preprocess else [found], expected if has_preprocess else [expected], strict=True
    ):
        assert np.abs(one - other).max() < SAME_PREDICTIONS


def test_logits_that_no_machine_holds_are_refused_before_the_model_runs(tmp_path: Path) -> None:
    store = TokenStore.from_samples(TOKEN_SAMPLES[:1] * 100_000)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    model = build_model("llama", vocab_size=100_000)
    trainer = Trainer(model, args, train_dataset=store, eval_dataset=store, compute_metrics=dict)
    with pytest.raises(UsageError, match="GiB: give preprocess_logits_for_metrics"):
        trainer.evaluate()
    with pytest.raises(UsageError, match="preprocess_logits_for_metrics have no effect on token data"):
        Trainer(model, args, train_dataset=store, preprocess_logits_for_metrics=lambda logits, _: logits)
