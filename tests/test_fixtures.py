"""The fixture layer itself: builders build, repeat themselves, disturb no generator; models train, data sets behave."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.fixtures import corpora, runs, selection
from tests.fixtures.datasets import LONGEST_SHAPE, NOISE
from tests.fixtures.models import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    build_model,
    build_pack,
    build_seq2seq_model,
    random_samples,
)
from tests.fixtures.oracles import linear_gradient
from tests.fixtures.regression import LinearModel
from tests.fixtures.tokenizers import TEMPLATES, build_tokenizer
from tests.fixtures.tolerances import CLOSED_FORM_FLOAT64, FITTED_FP32, LOSS_FP32, RANDOM_SPREAD
from tests.trainer.trainer_test_utils import (
    BasicTextGenerationModel,
    DynamicShapesDataset,
    RegressionDataset,
    RegressionModel,
    RegressionModelConfig,
    RegressionPreTrainedModel,
    RepeatDataset,
    SampleIterableDataset,
)

pytest_plugins = "pytester"

LENGTHS = (9, 2, 5)
TINY = 200_000  # bytes, of a corpus
MODELS: dict[str, Callable[[int], torch.nn.Module]] = {
    **{name: lambda seed, name=name: build_model(name, seed) for name in ARCHITECTURES},
    **{name: lambda seed, name=name: build_seq2seq_model(name, seed) for name in ENCODER_DECODERS},
    "linear": lambda seed: LinearModel(5, seed),
}
VALUES: dict[str, Callable[[int], Any]] = {
    "samples": lambda seed: random_samples(LENGTHS, seed),
    "pack": lambda seed: build_pack(LENGTHS, seed),
    "token samples": lambda seed: runs.random_token_samples(LENGTHS, seed),
    "chats": lambda seed: corpora.random_chats(7, seed),
    "points": lambda seed: list(RegressionDataset(length=9, seed=seed)),
    "stream": lambda seed: list(SampleIterableDataset(length=9, seed=seed)),
    "shapes": lambda seed: list(islice(DynamicShapesDataset(seed=seed), 64)),
}
CORPORA: dict[str, Callable[[Path], Path]] = {
    "ordinary": lambda path: corpora.write_chats(path, 9),
    "empty": lambda path: corpora.write_jsonl(path, []),
    "tokens": lambda path: corpora.write_tokens(path, LENGTHS),
    "mixed": corpora.write_mixed,
    "malformed": lambda path: corpora.write_malformed(path, line=2),
}


def generator_states() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


@pytest.fixture(autouse=True)
def _no_generator_is_disturbed() -> Iterator[None]:
    before = generator_states()
    yield
    assert generator_states() == before


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestBuilders:
    @pytest.mark.parametrize("name", MODELS)
    def test_models_are_functions_of_their_seed(self, name: str) -> None:
        build = MODELS[name]
        first = weights(build(1))
        assert same(first, weights(build(1)))
        assert not same(first, weights(build(2)))

    @pytest.mark.parametrize("name", VALUES)
    def test_data_are_functions_of_their_seed(self, name: str) -> None:
        build = VALUES[name]
        assert str(build(1)) == str(build(1)) != str(build(2))

    @pytest.mark.parametrize("name", CORPORA)
    def test_corpora_are_written_alike(self, name: str, tmp_path: Path) -> None:
        first, second = CORPORA[name](tmp_path / "1.jsonl"), CORPORA[name](tmp_path / "2.jsonl")
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size < TINY

    @pytest.mark.parametrize("template", [None, *TEMPLATES])
    def test_tokenizers_give_back_what_they_read(self, template: str | None) -> None:
        tokenizer = build_tokenizer(template)
        ids = tokenizer(corpora.NON_ASCII)["input_ids"]
        assert tokenizer.decode(ids) == corpora.NON_ASCII
        assert max(ids) < len(tokenizer)


def check_descends(model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor]) -> None:
    """One small step against the gradient lowers the loss, and every parameter has a gradient."""
    model.train()
    with torch.random.fork_rng(devices=[]):  # a layer may be drawn to be left out, with probability 0
        before = compute_loss()
    before.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.random.fork_rng(devices=[]):
        assert compute_loss() < before


def pretrained_line(**options: Any) -> RegressionPreTrainedModel:
    return RegressionPreTrainedModel(RegressionModelConfig(**options))


LINES = [RegressionModel, pretrained_line]


class TestModels:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_a_causal_model_trains(self, name: str) -> None:
        model, ids = build_model(name), random_samples([12])[0][None]
        check_descends(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)

    @pytest.mark.parametrize("name", ENCODER_DECODERS)
    def test_an_encoder_with_a_decoder_trains_and_generates(self, name: str) -> None:
        model, (source, target) = build_seq2seq_model(name), (sample[None] for sample in random_samples([9, 5]))
        check_descends(model, lambda: model(input_ids=source, labels=target).loss)
        answer = model.eval().generate(source, max_new_tokens=4, do_sample=False)
        assert answer[0, 0] == model.config.decoder_start_token_id

    @pytest.mark.parametrize("build", LINES)
    def test_a_line_is_found(self, build: Callable[..., Any]) -> None:
        model, points = build(), RegressionDataset(a=2, b=3)
        x, y = torch.from_numpy(points.x), torch.from_numpy(points.ys[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(40):
            optimizer.zero_grad()
            model(input_x=x, labels=y)[0].backward()
            optimizer.step()
        slope, intercept = np.polyfit(points.x, points.ys[0], 1)
        assert (model.a.item(), model.b.item()) == pytest.approx((slope, intercept), rel=FITTED_FP32)

    @pytest.mark.parametrize("build", LINES)
    def test_a_line_returns_what_it_is_asked_for(self, build: Callable[..., Any]) -> None:
        x, y = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 7.0])
        (predicted,) = build(a=2, b=3)(input_x=x)
        assert predicted.tolist() == [3.0, 5.0]
        loss, predicted = build(a=2, b=3)(input_x=x, labels=y, labels_2=y)
        assert (loss.item(), predicted.tolist()) == (2.0, [3.0, 5.0])
        assert [len(build(double_output=True)(x, labels)) for labels in (None, y)] == [2, 3]

    def test_a_saved_line_comes_back(self, tmp_path: Path) -> None:
        saved = RegressionPreTrainedModel(RegressionModelConfig(a=1.5, double_output=True))
        with torch.no_grad():
            saved.b.fill_(-0.25)
        saved.save_pretrained(tmp_path)
        loaded = RegressionPreTrainedModel.from_pretrained(tmp_path)
        assert same(weights(loaded), weights(saved))
        assert (loaded.config.a, loaded.double_output) == (1.5, True)

    def test_text_generation_trains_on_the_labels_as_they_stand(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BasicTextGenerationModel(vocab_size=11, hidden_size=6)
        ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
        logits = model(ids)
        loss, again = model(input_ids=ids, labels=labels)
        assert torch.equal(logits, again)
        by_hand = -sum(logits[0, t].log_softmax(-1)[labels[0, t]] for t in range(3)) / 3
        torch.testing.assert_close(loss, by_hand, rtol=LOSS_FP32, atol=0)
        check_descends(model, lambda: model(ids, labels)[0])

    @given(num_samples=st.integers(1, 7), num_features=st.integers(1, 5), seed=st.integers(0, 99))
    def test_the_gradient_of_the_linear_model_is_the_closed_form(
        self, num_samples: int, num_features: int, seed: int
    ) -> None:
        model = LinearModel(num_features, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_samples, num_features, generator=generator, dtype=torch.float64)
        targets = torch.randn(num_samples, generator=generator, dtype=torch.float64)
        model(input_x=x, labels=targets)[0].backward()
        expected = linear_gradient(x, targets, model.weight.detach(), model.bias.detach())
        for parameter, gradient in zip((model.weight, model.bias), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=CLOSED_FORM_FLOAT64, atol=CLOSED_FORM_FLOAT64)


class TestDatasets:
    def test_points_lie_near_the_line_under_every_name(self) -> None:
        points = RegressionDataset(a=-1, b=4, length=500, label_names=["labels", "labels_2"])
        assert len(points) == 500
        assert points[3].keys() == {"labels", "labels_2", "input_x"}
        errors = np.stack([y - (4 - points.x) for y in points.ys])
        assert errors.std(axis=1) == pytest.approx([NOISE, NOISE], rel=RANDOM_SPREAD)
        assert not np.array_equal(*points.ys)
        assert {value.dtype for value in points[0].values()} == {np.dtype(np.float32)}

    def test_the_first_point_is_the_one_that_users_know(self) -> None:
        assert RegressionDataset()[0]["input_x"] == np.float32(0.4967141530112327)

    def test_a_stream_repeats_its_points_and_has_no_length(self) -> None:
        stream, points = SampleIterableDataset(length=7), RegressionDataset(length=7)
        assert list(stream) == list(stream) == list(points)
        with pytest.raises(TypeError):
            len(stream)

    def test_a_sample_is_repeated_and_is_its_own_label(self) -> None:
        ids = torch.tensor([5, 6])
        items = list(RepeatDataset(ids, length=3))
        assert [(item["input_ids"].tolist(), item["labels"].tolist()) for item in items] == [([5, 6], [5, 6])] * 3

    @pytest.mark.parametrize(("length", "batch_size"), [(64, 8), (10, 4), (3, 5)])
    def test_shapes_change_from_batch_to_batch_only(self, length: int, batch_size: int) -> None:
        shapes = DynamicShapesDataset(length=length, batch_size=batch_size)
        assert len(shapes) == len(list(shapes)) == length
        sizes = [len(item["input_x"]) for item in shapes]
        assert sizes == [len(item["labels"]) for item in shapes]
        assert all(len(set(sizes[i : i + batch_size])) == 1 for i in range(0, length, batch_size))
        assert set(sizes) <= set(range(1, LONGEST_SHAPE + 1))
        assert len(set(sizes)) > 1 or length <= batch_size

    @pytest.mark.parametrize(
        "dataset",
        [RegressionDataset(), SampleIterableDataset(), RepeatDataset(torch.ones(3)), DynamicShapesDataset()],
        ids=lambda dataset: type(dataset).__name__,
    )
    def test_batches_stack(self, dataset: Any) -> None:
        batches = list(DataLoader(dataset, batch_size=8, generator=torch.Generator()))
        assert [len(batch["labels"]) for batch in batches] == [8] * 8


@pytest.mark.parametrize(("value", "ran"), [("", 1), ("0", 1), ("1", 2)])
def test_slow_tests_wait_for_run_slow(
    value: str, ran: int, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_SLOW", value)
    pytester.makeini("[pytest]\nmarkers = slow")
    pytester.makepyfile("import pytest\ndef test_quick(): pass\n@pytest.mark.slow\ndef test_slow(): pass")
    result = pytester.runpytest_inprocess("-p", selection.__name__, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=ran, skipped=2 - ran)
