"""Models of the hub: fetched, refused with the reason, and not waited for where there is no network."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import transformers
from huggingface_hub import constants

from tests.fixtures.hub import HubAnswers
from tests.fixtures.models import save_model
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.arguments import TrainingArguments
from trainer.data.sources import find_sources
from trainer.errors import DataError, ModelError
from trainer.model.build import find_model, load_model
from trainer.model.tokenizer import load_tokenizer

COMMIT = "c" * 40
MARK = "X-Error-Code"
GIVES_UP_WITHIN = 12.0  # seconds; the libraries alone take 23 and more


class Hub(ThreadingHTTPServer):
    """Answers as the hub does where models are asked for: `me/whole`, `me/bare` without weights, `me/gated`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder


class Answer(HubAnswers):
    server: Hub

    def do_GET(self) -> None:
        files = {path.name: path.read_bytes() for path in self.server.folder.iterdir()}
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        owner, name, *rest = [*parts, "", ""]
        rest = [part for part in rest if part]
        if name == "bare":
            del files["model.safetensors"]
        if (owner, name) not in {("me", "whole"), ("me", "bare"), ("me", "gated")}:
            self.answer(401, b"", {MARK: "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif rest[:1] == ["tree"]:
            tree = [{"type": "file", "oid": COMMIT, "size": len(data), "path": path} for path, data in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif rest[:1] != ["resolve"]:
            siblings = [{"rfilename": path} for path in files]
            about = {"id": f"me/{name}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps({**about, "downloads": 0, "likes": 0}).encode())
        elif name == "gated":
            self.answer(403, b"", {MARK: "GatedRepo", "X-Error-Message": "Access to model me/gated is restricted"})
        elif rest[-1] in files:
            self.answer(200, files[rest[-1]], {"ETag": f'"{name}{rest[-1]}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {MARK: "EntryNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "model"
    save_model(folder)
    build_tokenizer().save_pretrained(folder)
    with Hub(folder) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
        server.shutdown()


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as taken:  # bound and not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        use_hub(monkeypatch, address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        yield address


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made once, with the address of then
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def named(name: str) -> TrainingArguments:
    return TrainingArguments(model_name_or_path=name)


def test_a_model_of_the_hub_is_fetched_once_and_then_used_without_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    args = named("me/whole")
    tokenizer = load_tokenizer(args)
    load_model(args, tokenizer, seed=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        began = time.monotonic()
        assert load_tokenizer(args).get_vocab() == tokenizer.get_vocab()
        load_model(args, tokenizer, seed=0)
        assert time.monotonic() - began < GIVES_UP_WITHIN


@pytest.mark.parametrize(
    ("name", "said_of_model", "said_of_tokenizer"),
    [
        ("me/unknown", "Repository Not Found", "not a valid model identifier"),
        ("me/gated", "Cannot access gated repo", "Make sure to have access to it"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: Hub, name: str, said_of_model: str, said_of_tokenizer: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)no folder '{name}' here, and the hub does not give it.*{said_of_model}"):
        find_model(named(name))
    with pytest.raises(ModelError, match=f"(?s)from '{name}', which is no folder here.*{said_of_tokenizer}"):
        load_tokenizer(named(name))


def test_a_model_without_weights_is_told(hub: Hub) -> None:
    args = named("me/bare")
    with pytest.raises(ModelError, match="lacks model.safetensors"):
        load_model(args, load_tokenizer(args), seed=0)


def test_without_network_nothing_is_waited_for(no_hub: str, tmp_path: Path) -> None:
    began = time.monotonic()
    for load in (find_model, load_tokenizer):
        with pytest.raises(ModelError, match=f"'me/whole'.*downloaded before, and the hub {no_hub} cannot be reached"):
            load(named("me/whole"))
    with pytest.raises(DataError, match=f"me/chats: was not downloaded before, and the hub {no_hub} cannot be reached"):
        find_sources("hf://datasets/me/chats", None, None)
    assert time.monotonic() - began < GIVES_UP_WITHIN
