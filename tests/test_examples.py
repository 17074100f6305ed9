"""The quickstart's shipped files are what its scripts write, and they are fit to be learned from."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from trainer.config.arguments import TrainingArguments

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "examples" / "quickstart"
MAX_TRAIN_BYTES = 3_000_000  # what a repository may carry for a demonstration


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_data = load_script("make_data")
make_tokenizer = load_script("make_tokenizer")


def conversations(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()]


def questions(messages: list[dict[str, str]]) -> set[tuple[str, ...]]:
    """Every question with the facts of its system prompt: what must not be in both files."""
    system = "" if messages[0]["content"] == make_data.PLAIN_SYSTEM else messages[0]["content"]
    facts = system if messages[0]["role"] == "system" else ""
    return {(facts, message["content"]) for message in messages if message["role"] == "user"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(QUICKSTART / "tokenizer")


class TestData:
    @pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
    def test_script_reproduces_the_shipped_file(self, tmp_path: Path, name: str) -> None:
        make_data.write_data(tmp_path)
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()

    def test_another_seed_gives_other_data(self, tmp_path: Path) -> None:
        make_data.write_data(tmp_path, seed=1)
        assert (tmp_path / "heldout.jsonl").read_bytes() != (QUICKSTART / "heldout.jsonl").read_bytes()

    def test_no_held_out_question_is_trained(self) -> None:
        trained = set().union(*map(questions, conversations("train.jsonl")))
        held_out = set().union(*map(questions, conversations("heldout.jsonl")))
        assert trained.isdisjoint(held_out)

    @pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
    def test_turns_alternate_and_end_with_an_answer(self, name: str) -> None:
        for messages in conversations(name):
            roles = [message["role"] for message in messages]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2)
            assert all(message.keys() == {"role", "content"} for message in messages)
            assert all(message["content"] for message in messages)

    def test_every_kind_is_held_out_equally(self) -> None:
        kinds = Counter(task.kind for task in make_data.held_out_tasks(make_data.SEED))
        assert kinds == dict.fromkeys(make_data.KINDS, make_data.NUM_HELD_OUT_PER_KIND)

    def test_training_file_is_small(self) -> None:
        assert (QUICKSTART / "train.jsonl").stat().st_size < MAX_TRAIN_BYTES


@pytest.mark.parametrize(
    ("operation", "word", "answer"),
    [("spell", "BALU", "B-A-L-U"), ("reverse", "BALU", "ULAB"), ("shift", "BAZU", "CBAV"), ("vowels", "BALU", "AU")],
)
def test_word_operation(operation: str, word: str, answer: str) -> None:
    assert make_data.WORD_OPERATIONS[operation][0](word) == answer


class TestTokenizer:
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    def test_script_reproduces_the_shipped_file(self, tmp_path: Path, name: str) -> None:
        make_tokenizer.write_tokenizer(tmp_path, QUICKSTART / "train.jsonl")
        assert (tmp_path / name).read_bytes() == (QUICKSTART / "tokenizer" / name).read_bytes()

    @pytest.mark.parametrize("text", ["Reverse BALU", " two  spaces\n\ttab", "Übel 日本 🙂", "x'll , y .", "\x00"])
    def test_any_text_round_trips(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_letters_and_digits_are_single_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert tokenizer.tokenize("BALU-42") == list("BALU-42")

    def test_template_marks_answers_and_their_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for messages in conversations("heldout.jsonl"):
            rendered: Any = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            trained = tokenizer.decode([token for token, is_trained in pairs if is_trained])
            assert trained == "".join(answer + tokenizer.eos_token for answer in answers)

    def test_generation_prompt_is_a_prefix_of_the_conversation(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for messages in conversations("heldout.jsonl"):
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            assert whole == f"{prompt}{messages[-1]['content']}{tokenizer.eos_token}\n"


class TestModel:
    def test_config_fits_the_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        config = AutoConfig.from_pretrained(QUICKSTART / "model")
        assert config.vocab_size == -(-len(tokenizer) // 8) * 8
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("name", ["quickstart.yaml", "lora.yaml"])
def test_configuration_is_valid_and_names_files_that_exist(name: str) -> None:
    args = TrainingArguments.from_yaml(REPOSITORY / "examples" / name)
    assert (args.model_config is None) == (args.lora_rank is not None)
    for path in (args.model_config, args.tokenizer_name_or_path, args.data_path, args.validation_data_path):
        assert path is None or (REPOSITORY / path).exists()
    assert args.data_path is not None
    assert args.validation_data_path is not None
