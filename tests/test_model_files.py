"""Model folders that are not as they should be: the message names the file, whatever transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import save_model
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import ModelArguments
from trainer.errors import ModelError
from trainer.model.build import INDEX_NAME, load_model
from trainer.model.tokenizer import load_tokenizer


def load(folder: Path) -> None:
    load_model(ModelArguments(model_name_or_path=str(folder)), seed=0)


@pytest.mark.parametrize("text", ["{", "[]", ""])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_NAME])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, name: str, text: str) -> None:
    save_model(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
        {"dtype": "float3"},
        {"hidden_act": "none such"},
        {"rope_parameters": {"rope_type": "none such"}},
        {"model_type": "clip"},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match="no usable config.json|cannot be built as a causal language model") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "{"), ("tokenizer.json", '{"version": "1.0"}'), ("tokenizer_config.json", "[]")],
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, name: str, text: str) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match="no tokenizer could be loaded from"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
