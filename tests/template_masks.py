"""Label masks on published chat templates: `python -m tests.template_masks FOLDER` prints tables of what is right.

The templates are those of the packages in FOLDER (wheels, source archives and npm archives, which `tox -e templates`
downloads). Every chat is prepared with five kinds of tokenizer, and its ids and labels are held against
`template_oracle`. Where TRL has a training template, its masks are compared too.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import re
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from tests.fixtures.tokenizers import build_tokenizer
from tests.template_oracle import CONTROL, Judge, as_written, end_of_turn, shapes, squeezed, words_of
from trainer.config.groups import DataArguments
from trainer.data.jsonl import Document, FileKind
from trainer.data.spans import SpanFinder
from trainer.data.tokenize import DocumentTokenizer, Recipe
from trainer.errors import DataError
from trainer.labels import IGNORE_INDEX

KINDS = {
    "byte-level": "byte-level BPE, the EOS ends turns",
    "other EOS": "byte-level BPE that puts BOS before a text; its EOS ends turns only if the template writes it",
    "Metaspace": "words with their space before them, as SentencePiece's, and byte fallback",
    "Gemma": "as Gemma's: spaces become a letter, no word is split off",
    "legacy": "as Llama 2's and Phi 3's: a space before the text, control tokens that swallow the spaces around them",
}
"""Kinds of tokenizer."""

EOS_OF_TEMPLATES = (
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<eos>",
    "<|end|>",
)


# Templates from packages.


def published(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield package, name and text of each template in the packages of a folder; of equal texts the first."""
    seen = set()
    for path in sorted(folder.iterdir()):
        package = re.split(r"-\d", path.name)[0]
        found = [(name, text) for file, raw in files_of(path) for name, text in _templates_in(file, raw)]
        for name, text in sorted(found):
            if "messages" in text and text not in seen:
                seen.add(text)
                yield package, name, text


def files_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each file of a package that may hold templates."""
    suffixes = (".jinja", ".py", "chat-template-automap.ts")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(suffixes):
                    yield name, archive.read(name)
    elif path.suffix in (".gz", ".tgz"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(suffixes):
                    yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]


def _templates_in(file: str, raw: bytes) -> Iterator[tuple[str, str]]:
    """Yield name and text of the templates in a file: it is one, or has them as texts in its code, which is not run."""
    if file.endswith(".jinja"):
        yield Path(file).stem, raw.decode()
    elif b"{%" not in raw or b"messages" not in raw:
        return
    elif file.endswith(".ts"):
        for name, text in re.findall(r'model: "([^"]*)",\s*gguf: ("(?:[^"\\]|\\.)*")', raw.decode()):
            yield name.rpartition("/")[2], json.loads(text)
    else:
        for node in ast.walk(ast.parse(raw)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                text, target = node.value.value, node.targets[0]
                if isinstance(text, str) and "{%" in text and isinstance(target, ast.Name):
                    yield target.id.removesuffix("_template").replace("_", "-"), text


# Tokenizers.


@functools.cache
def backend_of(kind: str) -> str:
    """Build the tokenizer's backend of a kind, without the tokens of a template."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    backend = build_tokenizer(None, byte_level=kind in ("byte-level", "other EOS")).backend_tokenizer
    copied = Tokenizer.from_str(backend.to_str())
    if kind == "Gemma":
        copied.normalizer = normalizers.Replace(" ", "▁")
        copied.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        copied.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if kind == "legacy":
        copied.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        copied.pre_tokenizer = None
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        copied.decoder = decoders.Sequence(parts)
    return copied.to_str()


def tokenizer_for(template: str, kind: str) -> Any:
    """Build a tokenizer of a kind that holds the control tokens in a template's text."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bos, eos = ("<bos>", "<eos>") if kind == "Gemma" else ("<s>", "</s>")
    writes_eos = "eos_token" in template
    if kind == "other EOS":
        bos, eos = "<|begin|>", "<|endoftext|>"
    else:
        eos = next((token for token in EOS_OF_TEMPLATES if token in template and not writes_eos), eos)
    backend = Tokenizer.from_str(backend_of(kind))
    tokens = sorted(set(CONTROL.findall(template)) | {bos, eos})
    swallows = kind == "legacy"
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=swallows, lstrip=swallows and i % 2 == 0)
            for i, token in enumerate(tokens)
        ]
    )
    if kind == "other EOS":
        number = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<|endoftext|>", chat_template=template
    )


# Verdicts.


class Case:
    """A template with a kind of tokenizer: the trainer's preparation, and the oracle."""

    def __init__(self, template: str, kind: str) -> None:
        self.tokenizer = tokenizer_for(template, kind)
        self.has_marks = re.search(r"generation\s*-?%}", template) is not None
        recipe = Recipe.build(FileKind("messages", 1), self.tokenizer, DataArguments(), None)
        self.prepare = DocumentTokenizer(recipe)
        assert recipe.chat is not None
        self.finder = SpanFinder(recipe.chat)
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        self.oracle = Judge(template, special, exact=kind in ("byte-level", "other EOS"))

    def text(self, ids: Any) -> str:
        """Return the ids as text, without spaces where the tokenizer does not keep them."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if self.oracle.exact else squeezed(text)

    def judge(self, chat: dict[str, Any]) -> tuple[str, str]:
        """Say how a chat is masked: equal, wrong, refused (though it could be masked), or impossible; and why."""
        messages, tools = chat["messages"], chat.get("tools")
        try:
            batch, _ = self.prepare.tokenize([Document("chats.jsonl", 1, chat)])
        except DataError as error:
            return ("refused" if self.oracle.can_mask(messages, tools) else "impossible"), error.found
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        begin = 0
        for length in batch.lengths.tolist():
            ids, labels = batch.input_ids[begin : begin + length], batch.labels[begin : begin + length]
            begin += length
            spans += self._spans(ids, labels != IGNORE_INDEX, [words_of(messages[i]) for i in turns])
        # A split chat may hold its turns in another order.
        spans.sort(key=lambda pair: [not all(as_written(w, pair[1]) for w in words_of(messages[i])) for i in turns])
        wrong = "by its marks" if self.has_marks else "wrong"
        if len(spans) != len(turns):
            return wrong, f"{len(spans)} spans"
        for i, (before, span) in zip(turns, spans, strict=True):
            fault = self.oracle.fault(messages, tools, i, before, span)
            if fault is not None:
                return wrong, fault
        return "equal", ""

    def _spans(self, ids: Any, is_trained: Any, words: list[list[str]]) -> list[tuple[str, str]]:
        """Return each trained run as text, with the text before it; turns without headers make one run."""
        if not self.oracle.exact:
            words = [[squeezed(word) for word in turn] for turn in words]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_trained, [False]]).astype(int))).tolist()
        spans = []
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            before, run = self.text(ids[:start]), self.text(ids[start:stop])
            held = [turn for turn in words if turn and all(word in run for word in turn)]
            for turn in held[:-1]:
                last = max(run.find(word) + len(word) for word in turn)
                end = end_of_turn(run, last)
                if end is not None:
                    spans.append((before, run[:end]))
                    before, run = before + run[:end], run[end:]
            spans.append((before, run))
        return spans


@functools.lru_cache(maxsize=len(KINDS))
def case(template: str, kind: str) -> Case:
    return Case(template, kind)


def judge(template: str, chat: dict[str, Any], kind: str = "byte-level") -> tuple[str, str]:
    """Say how the trainer masks a chat, and why."""
    try:
        return case(template, kind).judge(chat)
    except Exception as error:  # noqa: BLE001  that is what is looked for
        return "traceback", repr(error)


def judge_all(template: str, kinds: list[str]) -> list[tuple[str, str, str, str]]:
    """Judge all shapes with each kind: kind, shape, outcome, reason."""
    return [(kind, shape, *judge(template, chat, kind)) for kind in kinds for shape, chat in shapes().items()]


FAMILIES = {
    "Apertus": "apertus",
    "Apriel": "apriel",
    "Command, Aya (Cohere)": "cohere|command|aya",
    "DeepSeek": "deepseek",
    "EXAONE": "exaone",
    "Falcon-H1": "falcon",
    "Gemma": "gemma",
    "GLM": "glm",
    "gpt-oss": "gpt-?oss",
    "Granite": "granite",
    "Hermes, ChatML": "hermes|chatml",
    "Idefics, SmolVLM": "idefics|smolvlm",
    "Kimi": "kimi",
    "LFM2": "lfm",
    "Nemotron": "nemotron",
    "Qwen, QwQ": "qwen|qwq",
    "Llama": "llama(?!-cpp)",
    "MiniCPM": "minicpm",
    "MiniMax": "minimax",
    "Mistral": "mistral|ministral|devstral|pixtral",
    "Phi": "phi",
    "Seed-OSS": "seed-oss",
    "SmolLM3": "smollm",
    "Solar": "solar",
}
"""Families of models, and what is in the names of their templates; the first that fits counts."""


Result = tuple[str, str, str, str, str]
"""Name of the template, kind of tokenizer, shape of the chat, outcome, reason."""


def table_by_family(results: list[Result]) -> str:
    """Lay out outcomes by family, with the commonest refusals."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[str, set[str]] = defaultdict(set)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for name, _, _, outcome, why in results:
        family = next(
            (f for f, pattern in FAMILIES.items() if re.search(pattern, name.rpartition("/")[2].lower())), "others"
        )
        names[family].add(name)
        counts[family][outcome] += 1
        if outcome in ("refused", "impossible"):
            short = re.sub(
                r"the chat template |of an assistant turn|\(field.*?\)|, (?:even|so) .*|refuses it: ", "", why
            )
            reasons[family][" ".join(re.sub(r"[|`<>]", "", short).split())[:70]] += 1
    lines = [
        "| family | templates | equal | by its marks | impossible | refused | wrong | why refused, commonest first |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for family in [*sorted(names.keys() - {"others"}, key=str.lower), "others"]:
        if family in names:
            numbers = [counts[family][outcome] for outcome in OUTCOMES]
            why = "; ".join(f"{reason} ({count})" for reason, count in reasons[family].most_common(3))
            cells = " | ".join(str(number or "") for number in numbers)
            lines.append(f"| {family} | {len(names[family])} | {cells} | {why} |")
    return "\n".join(lines)


OUTCOMES = ("equal", "by its marks", "impossible", "refused", "wrong")


def main() -> None:
    from tests.template_peers import compare_all

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="take templates only whose package and name have this in them")
    parser.add_argument("--every", type=int, default=1, help="take each n-th template only")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="kinds of tokenizer: " + "; ".join(map(": ".join, KINDS.items()))
    )
    parser.add_argument("--show", default="wrong,refused,traceback", help="outcomes to list")
    args = parser.parse_args()
    results: list[Result] = []
    templates = {f"{package}/{name}": text for package, name, text in published(args.folder)}
    names = [name for name in templates if args.only in name][:: args.every]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(judge_all, [templates[name] for name in names], repeat(args.kinds.split(",")))
        for name, outcomes in zip(names, found, strict=True):
            for kind, shape, outcome, why in outcomes:
                results.append((name, kind, shape, outcome, why))
                if outcome in args.show.split(","):
                    print(f"{outcome}: {name} · {kind} · {shape}: {why[:200]}", flush=True)
    totals = Counter(outcome for *_, outcome, _ in results)
    print(f"\n{table_by_family(results)}\n\n{len(names)} templates, {len(results):,} cases: {dict(totals)}")
    compared, num_faults = compare_all(args.folder)
    print(f"\n{compared}")
    if totals["wrong"] or totals["traceback"] or num_faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
