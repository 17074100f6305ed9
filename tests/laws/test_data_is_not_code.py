"""L11 for data: reading data, prepared stores or chat templates never executes code from them."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import trainer.data
from tests.fixtures.corpora import chat, write_jsonl, write_tokens
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore
from trainer.errors import DataError

MODULES = sorted(Path(trainer.data.__path__[0]).glob("*.py"))
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}

ESCAPES = [
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0].content) }}",
    "{{ lipsum.__globals__['os'].popen('touch ' ~ messages[0].content).read() }}",
    "{{ self.__init__.__globals__ }}",
    "{% include messages[0].content %}",
]


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_module_that_reads_data_can_execute_it(module: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_IMPORTS
        elif isinstance(node, ast.ImportFrom):
            names |= {(node.module or "").split(".")[0]} & FORBIDDEN_IMPORTS
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names |= {node.func.id} & FORBIDDEN_CALLS
    assert names == set()


@pytest.mark.parametrize("name", ["metadata.json", "index.arrow", "tokens.arrow"])
def test_a_pickle_in_place_of_a_stores_file_is_an_error(tmp_path: Path, name: str) -> None:
    target, path = tmp_path / "exploded", write_tokens(tmp_path / "t.jsonl", [5])
    store = prepare(path, None, DataArguments(data_cache_dir=str(tmp_path / "cache")))
    folder = tmp_path / "cache" / store.metadata["fingerprint"]
    (folder / name).write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(DataError):
        TokenStore.open(folder)
    assert not target.exists()


def test_a_pickle_in_place_of_a_data_file_is_an_error(tmp_path: Path) -> None:
    target, path = tmp_path / "exploded", tmp_path / "data.jsonl"
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(DataError, match=r"data.jsonl:1: "):
        prepare(path, None, DataArguments(data_cache_dir=str(tmp_path / "cache")))
    assert not target.exists()


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, template: str) -> None:
    target, file = tmp_path / "exploded", tmp_path / "template.jinja"
    file.write_text("{% generation %}<|im_end|>{% endgeneration %}" + template)
    path = write_jsonl(tmp_path / "c.jsonl", [chat(str(target), json.dumps({"a": "b"}))])
    with pytest.raises(DataError, match=r"c.jsonl:1: .*the chat template refuses it"):
        prepare(path, build_tokenizer(), DataArguments(data_cache_dir=str(tmp_path / "c"), chat_template=str(file)))
    assert not target.exists()
