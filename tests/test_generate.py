"""Answers to held-out chats: the same from every number of ranks, beside what they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.corpora import write_chats, write_jsonl
from tests.fixtures.models import tiny_llama
from tests.fixtures.runs import build_arguments
from tests.fixtures.tokenizers import END, TEXT_END, build_tokenizer
from trainer.config.groups import MachineArguments
from trainer.data.mixture import split_validation
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer
from trainer.model.prepared import Prepared
from trainer.training.generate import Answer, Question, answer_questions, end_ids, generate, prompt_of, questions_of

NUM_NEW = 5
VOCABULARY_SIZE = 320


def held_out(folder: Path, num_documents: int = 7) -> TokenStore:
    args = build_arguments(folder, data_cache_dir=str(folder / "cache"), dataset_num_proc=1)
    return prepare(write_chats(folder / "chats.jsonl", num_documents), build_tokenizer(), args, limit=512)


def greedily(model: Any, tokenizer: Any, question: Question) -> str:
    """One token after another, the model run anew on all of them each time."""
    ids = list(question.prompt_ids)
    for _ in range(NUM_NEW):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[len(question.prompt_ids) :], skip_special_tokens=True))


def trainer_over(folder: Path, store: TokenStore, eval_dataset: Any = None, **options: Any) -> Trainer:
    args = build_arguments(folder / "run", max_tokens_per_rank=512, generation_max_new_tokens=NUM_NEW, **options)
    model = tiny_llama(vocab_size=VOCABULARY_SIZE, max_position_embeddings=512)
    given = store if eval_dataset is None else eval_dataset
    return Trainer(model, args, train_dataset=store, eval_dataset=given, processing_class=build_tokenizer())


@pytest.mark.world_size(1, 2)
def test_each_of_several_held_out_sets_is_measured_as_if_alone(ranks, tmp_path: Path) -> None:
    stores = {}
    for name, num_documents in (("a", 3), ("b", 5)):
        folder = tmp_path / name
        folder.mkdir()
        stores[name] = held_out(folder, num_documents)
    options = {"eval_exact_match": True, "eval_at_end": True, "metric_for_best_model": "b_loss"}
    trainer = trainer_over(ranks.tmp_path, stores["a"], stores, **options)
    expected, answers = {}, []
    for name, store in stores.items():
        expected |= trainer.evaluate(store, metric_key_prefix=f"eval_{name}")
        answers += trainer.answers[0]
    found = trainer.evaluate()
    assert found.keys() == expected.keys() > {"eval_a_loss", "eval_b_exact_match"}
    assert all(
        found[name] == value for name, value in expected.items() if "per_second" not in name and "run" not in name
    )
    assert trainer.answers[0] == answers
    assert len(answers) == 8
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[-2]["eval_b_loss"]
    with pytest.raises(UsageError, match="'loss': eval_dataset is a dict"):
        trainer_over(ranks.tmp_path, stores["a"], stores, eval_at_end=True, export_best=True)


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.parametrize("num_documents", [1, 7], ids=["fewer_than_ranks", "more"])
def test_answers_are_the_greedy_ones_on_any_number_of_ranks(ranks, tmp_path: Path, num_documents: int) -> None:
    store, tokenizer = held_out(tmp_path, num_documents), build_tokenizer()
    trainer = trainer_over(tmp_path, store, eval_at_end=True, eval_exact_match=True)
    metrics = trainer.evaluate()
    questions = questions_of(store, tokenizer, None, None)
    model = tiny_llama(vocab_size=VOCABULARY_SIZE, max_position_embeddings=512)
    answers = trainer.answers[0]
    wanted = ranks.once(lambda: [greedily(model, tokenizer, question) for question in questions])
    assert [answer.answer for answer in answers] == wanted
    assert [answer.reference for answer in answers] == [question.reference for question in questions]
    assert metrics["eval_exact_match"] == sum(answer.is_exact for answer in answers) / num_documents


@pytest.mark.world_size(2)
def test_training_goes_on_after_answers(ranks, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_generation_samples": 2, "max_steps": 2}
    trainer = trainer_over(tmp_path, held_out(tmp_path), **options)
    assert trainer.train().global_step == 2
    assert {step: len(answers) for step, answers in trainer.answers.items()} == {1: 2, 2: 2}


def test_questions_are_those_of_the_held_out_documents_alone(tmp_path: Path) -> None:
    store = held_out(tmp_path, 10)
    train, validation = split_validation(store, 0.3, seed=0)
    tokenizer = build_tokenizer()
    asked = [[tuple(q.prompt_ids) for q in questions_of(part, tokenizer, None, None)] for part in (train, validation)]
    assert (len(asked[0]), len(asked[1])) == (7, 3)
    assert len(questions_of(validation, tokenizer, 2, None)) == 2


def test_a_question_ends_where_the_answer_begins(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    args = build_arguments(tmp_path, data_cache_dir=str(tmp_path / "cache"))
    tokenizer = build_tokenizer()
    (question,) = questions_of(prepare(path, tokenizer, args, 512), tokenizer, None, None)
    assert (question.asked, question.reference) == ("one", "two")
    assert tokenizer.decode(question.prompt_ids).endswith("assistant\n")


def test_an_answer_ends_with_the_turn_by_the_template_and_by_the_model(tmp_path: Path) -> None:
    tokenizer, model = build_tokenizer("plain"), tiny_llama(vocab_size=VOCABULARY_SIZE)
    tokenizer.eos_token = TEXT_END  # as Gemma: turns end with another token
    model.generation_config.eos_token_id = [7, 8]
    ids = tokenizer.convert_tokens_to_ids([END, TEXT_END])
    assert end_ids(model, tokenizer, None) == sorted([7, 8, *ids])
    prompts = [tokenizer("one two")["input_ids"]]
    with Group.join(MachineArguments(use_cpu=True)) as group:
        ((first, *_),) = generate(model, tokenizer, prompts, group, NUM_NEW, []).tolist()
        assert generate(model, tokenizer, prompts, group, NUM_NEW, [first]).tolist() == [[first]]
        (answer,) = answer_questions(
            Prepared.as_it_is(model), tokenizer, [Question("", prompts[0], "")], group, NUM_NEW, [first]
        )
    assert answer.answer == ""


def test_a_template_that_is_given_counts_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    """Of both, and of neither: then the last message is gone on with as it stands."""
    own, none, model = build_tokenizer(), build_tokenizer(None), tiny_llama(vocab_size=VOCABULARY_SIZE)
    none.eos_token = own.eos_token = TEXT_END
    model.generation_config.eos_token_id = None
    chat, end = [{"role": "user", "content": "one"}], own.convert_tokens_to_ids(END)
    (path := tmp_path / "template.jinja").write_text(own.chat_template)
    for tokenizer, template in ((own, None), (none, str(path)), (own, str(path))):
        assert end in end_ids(model, tokenizer, template)
        assert own.decode(prompt_of(tokenizer, chat, template)).endswith("assistant\n")
    assert end_ids(model, none, None) == [none.eos_token_id]
    assert prompt_of(none, chat, None) == none("one")["input_ids"]


def test_samples_that_were_no_chats_have_no_questions() -> None:
    store = TokenStore.from_samples([([5, 6], [5, 6])])
    with pytest.raises(UsageError, match="leave eval_exact_match, score_answers and num_generation_samples off"):
        questions_of(store, build_tokenizer(), None, None)


@pytest.mark.parametrize(("said", "is_exact"), [("A-B", True), (" A-B\n", True), ("A-B-C", False), ("", False)])
def test_white_space_at_the_ends_does_not_count(said: str, is_exact: bool) -> None:
    assert Answer("?", "A-B", said).is_exact == is_exact
