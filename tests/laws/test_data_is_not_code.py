"""L11 for data: reading data, prepared stores or chat templates never executes code from them."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import trainer.data
from tests.fixtures.corpora import chat, write_jsonl, write_tokens
from tests.fixtures.models import save_model
from tests.fixtures.runs import build_trainer, random_token_samples
from tests.fixtures.tokenizers import build_tokenizer
from trainer.atomic import read_sealed, write_sealed
from trainer.config.groups import DataArguments, ModelArguments
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore
from trainer.errors import DataError, TrainerError
from trainer.model.build import load_model
from trainer.training.saved_model import open_saved_model

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


IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@pytest.mark.parametrize("value", ["kernels-community/any", "flash_attention_2"])
def test_a_config_fetches_no_kernels(tmp_path: Path, value: str, caplog: pytest.LogCaptureFixture) -> None:
    """Either would have transformers fetch code from the hub, the second where its package is not installed."""
    build_tokenizer().save_pretrained(tmp_path)
    save_model(tmp_path, "mixtral", vocab_size=320)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in (*IMPLEMENTATIONS, "experts_implementation"):
        caplog.clear()
        (tmp_path / "config.json").write_text(json.dumps({**settings, name: value}))
        prepared = load_model(ModelArguments(model_name_or_path=str(tmp_path)), seed=0)
        assert prepared.attention is not None
        assert prepared.attention.name in ("packed_sdpa", "varlen")
        assert "is not used" in caplog.text or name.endswith("_internal")  # which transformers itself drops


def test_a_checkpoint_does_not_say_itself_that_its_code_is_trusted(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, random_token_samples([5, 6]), use_cpu=True, max_steps=1, save_strategy="steps")
    trainer.train()
    checkpoint = tmp_path / "checkpoints" / "step_1"
    marker = tmp_path / "ran"
    config = json.loads((checkpoint / "model" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    code = f"import pathlib\nfrom transformers import PretrainedConfig\npathlib.Path({str(marker)!r}).touch()\n"
    options = json.loads((checkpoint / "training_params.json").read_text())
    about, _ = read_sealed(checkpoint / "manifest.json")
    for name, text in {
        "model/config.json": json.dumps(config),
        "model/own.py": code + "class OwnConfig(PretrainedConfig): model_type = 'own'\nclass Own: pass\n",
        "training_params.json": json.dumps({**options, "trust_remote_code": True}),
    }.items():
        (checkpoint / name).write_text(text)
        fact = {"num_bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        about["files"][name] = fact
    write_sealed(checkpoint / "manifest.json", about)
    with pytest.raises(TrainerError):
        open_saved_model(checkpoint)
    assert not marker.exists()
    with pytest.raises(TrainerError):
        open_saved_model(checkpoint, trust_remote_code=True)
    assert marker.exists()  # so that the test does not pass for another reason
