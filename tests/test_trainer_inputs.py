"""What Trainer is given: each wrong thing is a message before the first step, and nothing given is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from tests.fixtures.corpora import assistant, chat, user, write_jsonl
from tests.fixtures.models import VOCABULARY, tiny_llama
from tests.fixtures.runs import build_arguments
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.arguments import TrainingArguments
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore
from trainer.errors import DataError, ModelError, UsageError
from trainer.hf.trainer import Trainer

STORE = TokenStore.from_samples([([3, 4, 5], [3, 4, 5]), ([6, 7], [6, 7])])
BEYOND = TokenStore.from_samples([([3, VOCABULARY, 5], [3, VOCABULARY, 5])])
VOCABULARY_SIZE = 320  # of build_tokenizer


def build(folder: Path, *, model: Any = None, train_dataset: Any = STORE, **more: Any) -> Trainer:
    given = {name: more.pop(name) for name in ("eval_dataset", "processing_class") if name in more}
    args = build_arguments(folder / "run", **more)
    return Trainer(model if model is not None else tiny_llama(), args, train_dataset=train_dataset, **given)


def chat_trainer(
    folder: Path, documents: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, positions: int = 128, **more: Any
) -> Trainer:
    """A run that is to answer held-out chats, over the same chats."""
    path = write_jsonl(folder / "chats.jsonl", documents)
    options = {"train_on": "all", "max_tokens_per_rank": 64, "eval_at_end": True, "eval_exact_match": True, **more}
    args = build_arguments(
        folder / "run", **{"generation_max_new_tokens": 8, "data_cache_dir": str(folder / "cache"), **options}
    )
    store = prepare(path, tokenizer, args, 64)
    model = tiny_llama(vocab_size=VOCABULARY_SIZE, max_position_embeddings=positions)
    return Trainer(model, args, train_dataset=store, eval_dataset=store, processing_class=tokenizer)


@pytest.mark.parametrize("dataset", [7, "data.jsonl"], ids=str)
def test_what_has_no_samples_is_refused(tmp_path: Path, dataset: Any) -> None:
    with pytest.raises(UsageError, match=r"train_dataset is a builtins\.(int|str): give something with samples"):
        build(tmp_path, train_dataset=dataset)


def test_held_out_token_data_is_not_for_ordinary_training_nor_the_other_way_round(tmp_path: Path) -> None:
    samples = [{"input_ids": [3, 4], "labels": [3, 4]}]
    with pytest.raises(UsageError, match=r"a data set is a builtins\.list: give JsonlDataset"):
        build(tmp_path, eval_dataset=samples)
    with pytest.raises(UsageError, match="eval_dataset is token data and train_dataset is not"):
        build(tmp_path, train_dataset=samples, eval_dataset=STORE, batch_size=64, max_tokens_per_rank=8192)


def test_arguments_of_another_kind_are_refused() -> None:
    args: Any = {"learning_rate": 1.0}
    with pytest.raises(UsageError, match=r"args is a builtins.dict: give trainer.TrainingArguments"):
        Trainer(tiny_llama(), args, train_dataset=STORE)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    for model in (torch.nn.Linear(2, 2), LlamaForSequenceClassification(tiny_llama().config), "path"):
        with pytest.raises(ModelError, match="give a transformers causal language model"):
            build(tmp_path, model=model)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.is_quantized = True
    with pytest.raises(ModelError, match="quantised weights cannot be trained"):
        build(tmp_path, model=model)


def test_token_ids_without_an_embedding_are_refused(tmp_path: Path) -> None:
    message = rf"train_dataset holds token id {VOCABULARY}; the model's ids are 0 to {VOCABULARY - 1}"
    with pytest.raises(DataError, match=message):
        build(tmp_path, train_dataset=BEYOND)
    with pytest.raises(DataError, match="eval_dataset holds token id"):
        build(tmp_path, eval_dataset=BEYOND)
    with pytest.raises(DataError, match="eval_dataset holds token id"):
        build(tmp_path).evaluate(BEYOND)


@pytest.mark.parametrize("sample", [([3, -4], [3, 4]), ([3, 4], [3, -5])], ids=str)
def test_negative_token_ids_are_refused(sample: tuple[list[int], list[int]]) -> None:
    with pytest.raises(DataError, match="negative token id"):
        TokenStore.from_samples([sample])


def test_held_out_samples_past_the_models_positions_are_refused(tmp_path: Path) -> None:
    ids = [3] * 20
    held_out = TokenStore.from_samples([(ids, ids)])
    with pytest.raises(ModelError, match="the longest sample has 20 tokens"):
        build(tmp_path, model=tiny_llama(max_position_embeddings=16), eval_dataset=held_out)


def test_held_out_data_is_used_or_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    path = write_jsonl(tmp_path / "chats.jsonl", [chat("a", "b"), chat("c", "d")])
    named: dict[str, Any] = {"data_path": str(path), "data_cache_dir": str(tmp_path / "cache")}
    given: dict[str, Any] = {
        "model": tiny_llama(vocab_size=VOCABULARY_SIZE),
        "train_dataset": None,
        "processing_class": tokenizer,
        "eval_dataset": STORE,
    }
    trainer = build(tmp_path, **given, **named)
    assert (len(trainer.train_dataset), trainer.eval_dataset) == (2, STORE)
    for held_out in ({"validation_split": 0.5}, {"validation_data_path": str(tmp_path / "held_out.jsonl")}):
        with pytest.raises(UsageError, match="exclude each other"):
            build(tmp_path, **given, **named, **held_out)
        with pytest.raises(UsageError, match="have no effect beside train_dataset: give eval_dataset"):
            build(tmp_path, **held_out)


def test_a_metric_that_is_not_measured_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'exact_match': measured are loss, num_loss_tokens"):
        build(tmp_path, eval_dataset=STORE, eval_at_end=True, metric_for_best_model="exact_match")


def test_what_cannot_be_answered_is_refused_before_training(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("plain")
    cases: list[tuple[list[dict[str, Any]], int, type[Exception], str]] = [
        ([{"messages": [user("a")]}], 128, DataError, r"chats.jsonl:1: field 'messages': found no assistant turn"),
        ([{"text": "a b"}], 128, UsageError, "not for 'text' data"),
        ([chat("a", "b")], 20, UsageError, "the model has positions for 20"),
    ]
    for documents, positions, kind, message in cases:
        trainer = chat_trainer(tmp_path, documents, tokenizer, positions)
        with pytest.raises(kind, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
        assert not (tmp_path / "run").exists()


def test_answers_need_a_tokenizer(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset=STORE, eval_at_end=True, eval_exact_match=True)
    with pytest.raises(UsageError, match="need a tokenizer: give processing_class"):
        trainer.train()


def test_questions_survive_their_file(tmp_path: Path) -> None:
    trainer = chat_trainer(tmp_path, [chat("a", "b")], build_tokenizer(), eval_on_start=True)
    assert "eval_exact_match" in trainer.evaluate()
    (tmp_path / "chats.jsonl").unlink()
    assert "eval_exact_match" in trainer.evaluate()


@pytest.mark.parametrize("absent", [["pad_token"], ["pad_token", "eos_token"]], ids=str)
def test_answers_need_no_padding_token(tmp_path: Path, absent: list[str]) -> None:
    tokenizer = build_tokenizer()
    for name in absent:
        setattr(tokenizer, name, None)
    documents = [chat("a", "b"), chat("a longer question", "b")]
    assert "eval_exact_match" in chat_trainer(tmp_path, documents, tokenizer).evaluate()


def test_a_question_may_be_without_content(tmp_path: Path) -> None:
    question = {"role": "user", "name": "x"}
    trainer = chat_trainer(tmp_path, [{"messages": [question, assistant("b")]}], build_tokenizer("plain"))
    trainer.evaluate()
    assert [answer.asked for answer in trainer.answers[0]] == [""]


def test_defaults_are_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model_name_or_path is missing"):
        Trainer(args=TrainingArguments(output_dir=str(tmp_path)))
