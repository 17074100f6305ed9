"""Every code block of the documents: what is written there is understood, and it runs.

Blocks of a page run in order in one folder, with tiny models under the names of the hub that the documents use; runs
are cut to two steps. A block that starts with a comment that names a file (`# chats.yaml`) is that file. A comment
above a block, `<!-- not run: REASON -->`, leaves it out. `RUN_SLOW=1` runs all; else blocks are read alone.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.corpora import chat, write_chats, write_jsonl
from tests.fixtures.models import build_model, build_seq2seq_model
from tests.fixtures.tokenizers import build_tokenizer
from tests.shape.source import ROOT
from tests.shape.test_packaging import EXTRAS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?:not run: )?(?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)\n```", flags=re.S)
PLAIN = ("", "text", "jinja")  # formulas, trees of folders, templates
HUB_NAMES = {"Qwen/Qwen2.5-0.5B-Instruct": "llama", "Qwen/Qwen2.5-0.5B": "llama", "google-t5/t5-small": "t5"}
SHORTENED = {"train": ["--max-steps=2", "--use-cpu"], "evaluate": ["--use-cpu"], "generate": ["--use-cpu"]}
LEAST = {"model_name_or_path": "llama", "data_path": "chats.jsonl"}  # of a run, where a page shows a few options alone
ROWS = 24


@dataclass(frozen=True)
class Block:
    """A block of code."""

    language: str
    text: str
    reason: str | None  # for which it does not run

    @property
    def file(self) -> str | None:
        """The file that it is."""
        named = re.match(r"(?:# |\{# )([\w-]+\.(?:yaml|py|jinja))", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command; continued lines are one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page, with the names of the hub as folders."""
    text = page.read_text(encoding="utf-8")
    for name in sorted(HUB_NAMES, key=len, reverse=True):
        text = text.replace(name, HUB_NAMES[name])
    return [Block(found["language"], found["text"], found["reason"]) for found in BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader is supposed to have: models, and data in the forms that the pages speak of."""
    folder = tmp_path_factory.mktemp("reader")
    llama = build_model("llama", vocab_size=320, max_position_embeddings=16384)
    for name, model in (("llama", llama), ("t5", build_seq2seq_model("t5", vocab_size=320))):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    write_data(folder)
    return folder


def write_data(folder: Path) -> None:
    write_chats(folder / "chats.jsonl", ROWS)
    shutil.copy(folder / "chats.jsonl", folder / "heldout.jsonl")
    whole = (folder / "chats.jsonl").read_text(encoding="utf-8")
    (folder / "broken.jsonl").write_text(whole + '{"messages": [}\n', encoding="utf-8")
    questions = [(f"question {i}", f"answer {i}") for i in range(ROWS)]
    write_jsonl(folder / "texts.jsonl", [{"text": f"{asked} {said} " * 20} for asked, said in questions])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": asked, "completion": said} for asked, said in questions])
    turns = [[{"from": "human", "value": asked}, {"from": "gpt", "value": said}] for asked, said in questions]
    write_jsonl(folder / "sharegpt.jsonl", [{"conversations": turn} for turn in turns])
    write_jsonl(folder / "dialogues.jsonl", [{"dialogue": chat(*pair)["messages"]} for pair in questions])
    alpaca = [{"instruction": asked, "input": "", "output": said} for asked, said in questions]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    shutil.copytree(ROOT / "examples", folder / "examples")


@pytest.fixture
def reader(readers_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, to work in for the length of a test; home is elsewhere."""
    folder = shutil.copytree(readers_folder, tmp_path / "folder")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def write_files(blocks: list[Block]) -> None:
    for block in blocks:
        if block.file is not None:
            Path(block.file).write_text(block.text + "\n", encoding="utf-8")


def is_understood(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Check a command without running it: of ours, an unknown option is all that is wrong with it."""
    from trainer.cli.main import COMMANDS, main

    match words:
        case ["trainer", command, *rest]:
            if command not in COMMANDS:
                pytest.fail(f"there is no trainer {command}")
            code = main([command, *rest, "--no-such-option"])
            refused = capsys.readouterr().err
            if code != 2 or "--no-such-option" not in refused or refused.count("\n") != 1:
                pytest.fail(f"{shlex.join(words)}: {refused}")
        case ["pip", "install", *requirements]:
            named = {name for each in requirements for name in re.findall(r"reference-trainer\[(.+)\]", each)}
            assert {extra for names in named for extra in names.split(",")} <= EXTRAS.keys()
        case ["python", "-m", module, *_] if module != "pytest":
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        case ["pytest", "--pyargs", package, *_]:
            assert Path(ROOT, package.replace("trainer_testing.", "tests/fixtures/")).exists(), package
        case ["python" | "pytest", *rest]:
            files = [word.partition("::")[0] for word in rest if "/" in word and not word.startswith("-")]
            assert files, f"{words} names no file of the repository"
            assert [file for file in files if not (ROOT / file).exists()] == []
        case ["tox", "-e", environments, *_]:
            tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
            assert [
                name for name in environments.split(",") if not re.search(rf"^\[testenv:.*\b{name}\b", tox, re.M)
            ] == []
        case _:
            pytest.fail(f"what is {shlex.join(words)}? Say why it is not run: <!-- not run: REASON -->")


def check_yaml(block: Block) -> None:
    """Check a whole configuration, or a few options as those of a run that needs nothing else."""
    from trainer.config.arguments import TrainingArguments

    options: dict[str, Any] = yaml.safe_load(block.text)
    if block.file is None:
        least = {name: value for name, value in LEAST.items() if name != "data_path" or "data_mixture" not in options}
        options = {**least, **options}
    TrainingArguments.from_mapping(options)


def check_block(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    if block.language == "python":
        compile(block.text, "block", "exec")
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml" and block.reason is None:
        check_yaml(block)
    elif block.language in ("bash", "console"):
        for words in block.commands if block.reason is None else ():
            is_understood(words, capsys)
    else:
        assert block.reason or block.language in PLAIN, f"a block of {block.language!r}, which no test reads"
        assert not re.search(r"^(?:\$ |trainer |pip )", block.text, flags=re.M), "commands are bash or console"


def test_every_block_is_understood(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = []
    num_blocks = 0
    for page in PAGES:
        blocks = blocks_of(page)
        write_files(blocks)
        for block in blocks:
            try:
                check_block(block, capsys)
            except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  all pages are told at once
                faults.append(f"{page.name}: {block.text.splitlines()[0]}: {error}")
        num_blocks += len(blocks)
    assert faults == [], "\n".join(faults)
    assert num_blocks > 50


def run_command(words: list[str]) -> None:
    from trainer.cli.main import main

    if words[0] != "trainer":
        return  # others are held by tests of their own
    code = main([*words[1:], *SHORTENED.get(words[1], [])])
    assert code == 0, f"{shlex.join(words)}: exit code {code}"


def run_block(block: Block, names: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> bool:
    """Run a block and return whether it was one to run; what a console shows must be shown, but for its `...`."""
    if block.reason is not None or block.file is not None:
        return False
    if block.language == "python":
        exec(compile(block.text, "block", "exec"), names)  # noqa: S102
    for words in block.commands if block.language in ("bash", "console") else ():
        capfd.readouterr()
        run_command(words)
        shown = capfd.readouterr().out
    if block.language == "console":
        for line in block.text.splitlines():
            pattern = r".*?".join(map(re.escape, re.split(r"\.\.\.", line.strip())))
            assert line.startswith("$ ") or re.search(pattern, shown), f"{line!r} is not in:\n{shown}"
    return True


PAGES_THAT_RUN = [
    page
    for page in PAGES
    if {"bash", "console", "python"} & {b.language for b in blocks_of(page) if b.reason is None and b.file is None}
]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, reader: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blocks = blocks_of(page)
    write_files(blocks)
    names: dict[str, Any] = {"__name__": "__main__"}
    assert any([run_block(block, names, capfd) for block in blocks])
