"""Write the quickstart's tokenizer: words are tokens, capital letters and digits stand alone.

It owns tokenizer/ (tokenizer.json, tokenizer_config.json, chat_template.jinja) and reads train.jsonl, nothing else.
Invariant: any text survives encoding and decoding, because what is no known word falls back to its UTF-8 bytes.

    python examples/quickstart/make_tokenizer.py       # after make_data.py
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")
PIECE = r"[A-Z][a-z]+| ?[a-z]+|[A-Z]|[0-9]|[^A-Za-z0-9]"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- message['content'] + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def byte_characters() -> list[str]:
    """The printable character by which the byte-level scheme of GPT-2 writes each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def words(data: Path) -> list[str]:
    """Every piece of two or more characters in the messages, roles included, in alphabetical order."""
    found = set(ROLES)
    for line in data.read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            found.update(piece for piece in re.findall(PIECE, message["content"]) if len(piece) > 1)
    return sorted(found)


def tokenizer_json(known_words: list[str]) -> dict[str, Any]:
    """A BPE without merges: a piece is one token if it is known, else one token per byte."""
    alphabet = byte_characters()
    written = ["".join(alphabet[byte] for byte in word.encode()) for word in known_words]
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *written]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": PIECE}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """What transformers must know besides: the special tokens, and that decoding cleans nothing up."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }


def write_tokenizer(directory: Path, data: Path) -> None:
    """Write the tokenizer folder."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "tokenizer.json", tokenizer_json(words(data)))
    write_json(directory / "tokenizer_config.json", tokenizer_config())
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, with non-ASCII characters as they are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=here / "tokenizer")
    parser.add_argument("--data", type=Path, default=here / "train.jsonl")
    options = parser.parse_args()
    write_tokenizer(options.directory, options.data)
