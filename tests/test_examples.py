"""The files of the examples are what their scripts write, they are fit to be learned from, and each example learns."""

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.fixtures.ranks.launch import Launch
from trainer.cli.check import check_before_start
from trainer.cli.main import main
from trainer.config.arguments import Seq2SeqTrainingArguments, TrainingArguments

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "examples" / "quickstart"
MAX_BYTES = 3_500_000  # what a repository may carry for demonstrations
GOAL = 0.9  # share of held-out questions answered exactly
LOSS_OF_GUESSING, GOAL_OF_PRETRAINING = 5.5, 0.8


def load_script(name: str, folder: Path = QUICKSTART) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
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
    def test_script_reproduces_the_shipped_files(self, tmp_path: Path) -> None:
        make_data.write_data(tmp_path)
        names = {path.name for path in QUICKSTART.glob("*.jsonl")}
        assert names == {path.name for path in tmp_path.iterdir()}
        assert [name for name in names if (tmp_path / name).read_bytes() != (QUICKSTART / name).read_bytes()] == []

    def test_another_seed_gives_other_data(self, tmp_path: Path) -> None:
        make_data.write_data(tmp_path, seed=1)
        assert (tmp_path / "heldout.jsonl").read_bytes() != (QUICKSTART / "heldout.jsonl").read_bytes()

    @pytest.mark.parametrize("prefix", ["", "new-"])
    def test_no_held_out_question_is_trained(self, prefix: str) -> None:
        trained = set().union(*map(questions, conversations(f"{prefix}train.jsonl")))
        held_out = set().union(*map(questions, conversations(f"{prefix}heldout.jsonl")))
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

    def test_files_are_small(self) -> None:
        assert sum(path.stat().st_size for path in QUICKSTART.glob("*.jsonl")) < MAX_BYTES


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


TOKEN_EXAMPLES = ["quickstart", "pretraining", "lora", "osft"]


@pytest.mark.parametrize("name", TOKEN_EXAMPLES)
def test_configuration_is_valid_and_names_files_that_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    args = TrainingArguments.from_yaml(f"examples/{name}.yaml")
    assert args.output_dir == f"outputs/{name}"
    if args.model_name_or_path is not None:  # what the quickstart leaves, by its number of samples
        first = TrainingArguments.from_yaml("examples/quickstart.yaml")
        assert make_data.NUM_TRAIN % first.batch_size == 0
        num_samples = first.max_steps * first.batch_size
        assert args.model_name_or_path == f"{first.output_dir}/hf_format/samples_{num_samples}"
        args.model_name_or_path, args.tokenizer_name_or_path = None, first.tokenizer_name_or_path
        args.model_config = first.model_config
    check_before_start(args)


def run_example(folder: str, name: str, words: list[str]) -> list[dict[str, Any]]:
    """Run an example from the top of the repository; return its evaluations."""
    os.chdir(REPOSITORY)
    if name == "seq2seq":
        args = Seq2SeqTrainingArguments.from_yaml("examples/seq2seq.yaml")
        args.output_dir = folder
        if words:
            args.max_steps, args.eval_steps = 2, 1
        return [load_script("seq2seq", REPOSITORY / "examples").main(args)]
    assert main(["train", f"examples/{name}.yaml", f"--output-dir={folder}", *words]) == 0
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "eval_loss" in line]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model such as the quickstart leaves, untrained."""
    folder = tmp_path_factory.mktemp("base")
    config = AutoConfig.from_pretrained(QUICKSTART / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART / "tokenizer").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["pretraining", "lora", "osft", "seq2seq"])
def test_an_example_runs(launch: Launch, tmp_path: Path, name: str, base: str) -> None:
    words = ["--max-steps=2", "--use-cpu"]
    if name == "pretraining":
        words.append("--eval-steps=2")
    elif name != "seq2seq":
        words.append(f"--model-name-or-path={base}")
    (done,) = launch(1, run_example, str(tmp_path / "run"), name, words, group=False, env={"HOME": str(tmp_path)})
    assert done.value, done.log


@pytest.mark.learns
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_examples_learn(launch: Launch, tmp_path: Path) -> None:
    def evaluations(name: str, *words: str) -> list[dict[str, Any]]:
        folder = str(tmp_path / name)
        (done,) = launch(1, run_example, folder, name, list(words), group=False, timeout=300)
        assert done.value, done.log
        return list(done.value)

    first, *_, last = evaluations("pretraining")
    assert first["eval_loss"] > LOSS_OF_GUESSING
    assert last["eval_loss"] < GOAL_OF_PRETRAINING
    assert evaluations("seq2seq")[-1]["eval_exact_match"] > GOAL
    evaluations("quickstart", "--eval-strategy=no", "--no-eval-on-start")
    (base,) = (tmp_path / "quickstart" / "hf_format").iterdir()
    for name in ("lora", "osft"):
        first, last = evaluations(name, f"--model-name-or-path={base}")
        assert first["eval_exact_match"] == 0
        assert last["eval_exact_match"] > GOAL
