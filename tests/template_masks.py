"""Label masks on real chat templates: `python -m tests.template_masks FOLDER` prints a table of what is right.

The templates are those of the packages in FOLDER (wheels and source archives, which `tox -e templates` downloads). The
checks in `judge` know nothing of the trainer: they render with transformers and look for the words of each turn.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fixtures.tokenizers import build_tokenizer
from trainer.data.chat import ChatFormat, TemplateError
from trainer.data.spans import SpanFinder

# Names of tokens that end what a model writes, in the templates that are published.
END_NAMES = (
    r"im_end|eot_id|eom_id|eom|message_sep|tools_suffix|end_of_turn|eot|end|return|call|endoftext|end_of_text|END_OF_TURN_TOKEN|eos|/s|turn\||"
    r"assistant_end|end_of_sentence|end▁of▁sentence|im_sep_end|user|observation|system|tool_response|eod|EOT|end_message|"
    r"turn_end|message_end|endofprompt|role_end|end_of_role|seed:eos|separator|sep|eoa|EOS|endofturn|end_of_msg|msg_end|"
    # Idefics and SmolVLM; a tool call of Solar; Nemotron Nano 2, whose EOS is this reserved token.
    r"end_of_utterance|calls|SPECIAL_12"
)
END = re.compile(rf"(?:<[|｜]?/?(?:{END_NAMES})[|｜]?>|\[(?:EOT|e~\[|/?s)\]|</s>|\[e~\[|<eos>|\[\|endofturn\|\])")
CONTROL = re.compile(
    r"<[|｜][^<>{}'\"]{1,40}[|｜]>|<[a-zA-Z_▁:/][\w▁:/|]{1,30}>|\[/?[A-Z_]{2,24}\]|\[gMASK\]|<[a-z_]+\|>|<\|[a-z_\"]+>|\[e~\[|\]~b\]|\[\|[a-z]+\|\]"
)
OPENED = re.compile(
    r"(?:<[\w:|]*(?:think|thought|reason|START_THINKING|inner_prefix)[\w:|]*>|\[THINK\])\s*\Z"
    r"|Here are my reasoning steps:\s*\Z|<\|channel>thought\s*\Z"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add numbers",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]


def shapes() -> dict[str, dict[str, Any]]:
    """The chats, by name; every text is unlike any other."""
    u = [{"role": "user", "content": f"Ask {word}"} for word in ("zero", "two", "four")]
    a = [{"role": "assistant", "content": f"Reply {word}"} for word in ("one", "three", "five")]
    r = [
        {**turn, "reasoning_content": f"Because {word}."}
        for turn, word in zip(a, ("alpha", "beta", "gamma"), strict=True)
    ]
    t = [
        {**turn, "content": f"<think>\nBecause {word}.\n</think>\n\n{turn['content']}"}
        for turn, word in zip(a, ("alpha", "beta", "gamma"), strict=True)
    ]
    s = {"role": "system", "content": "Be brief"}

    def call(arguments: Any, content: Any = "", name: str = "call00001") -> dict[str, Any]:
        function = {"name": "add", "arguments": arguments}
        return {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"id": name, "type": "function", "function": function}],
        }

    two = call({"a": 1717})
    two["tool_calls"] = [*two["tool_calls"], *call({"a": 3939}, name="call00002")["tool_calls"]]
    result = {"role": "tool", "content": "4242", "tool_call_id": "call00001", "name": "add"}
    result2 = {"role": "tool", "content": "5353", "tool_call_id": "call00002", "name": "add"}
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (u[0], a[0], u[1], a[1])]
    named = {
        "one turn": [u[0], a[0]],
        "two turns": [u[0], a[0], u[1], a[1]],
        "three turns": [u[0], a[0], u[1], a[1], u[2], a[2]],
        "system": [s, u[0], a[0]],
        "system, two turns": [s, u[0], a[0], u[1], a[1]],
        "assistant first": [a[0], u[0], a[1]],
        "consecutive": [u[0], a[0], a[1]],
        "ends with user": [u[0], a[0], u[1]],
        "parts": parts[:2],
        "parts, two turns": parts,
        "spaces": [u[0], {**a[0], "content": "\n Reply one \n"}],
        "reasoning": [u[0], r[0]],
        "reasoning, two turns": [u[0], r[0], u[1], r[1]],
        "reasoning, last only": [u[0], a[0], u[1], r[1]],
        "reasoning, first only": [u[0], r[0], u[1], a[1]],
        "think": [u[0], t[0]],
        "think, two turns": [u[0], t[0], u[1], t[1]],
        "think, last only": [u[0], a[0], u[1], t[1]],
    }
    with_tools = {
        "tools unused": [u[0], a[0]],
        "tools unused, system, two turns": [s, u[0], a[0], u[1], a[1]],
        "call": [u[0], call({"a": 1717})],
        "call as text": [u[0], call('{"a": 1717}'), result, a[0]],
        "call and answer": [u[0], call({"a": 1717}), result, a[0]],
        "call, null content": [u[0], call({"a": 1717}, None), result, a[0]],
        "call beside text": [u[0], call({"a": 1717}, "Reply six"), result, a[0]],
        "two calls": [u[0], two, result, result2, a[0]],
        "call, answer, another turn": [u[0], call({"a": 1717}), result, a[0], u[1], a[1]],
        "reasoned call": [u[0], {**call({"a": 1717}), "reasoning_content": "Because delta."}, result, a[0]],
    }
    chats: dict[str, dict[str, Any]] = {name: {"messages": messages} for name, messages in named.items()}
    chats |= {name: {"messages": messages, "tools": TOOLS} for name, messages in with_tools.items()}
    return chats


def words_of(turn: dict[str, Any]) -> list[str]:
    """What must be in the text of a turn."""
    content = turn.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    words = [line.strip() for line in re.split(r"</?think>|\n", content) if line.strip()]
    words += [turn[name] for name in ("reasoning_content",) if turn.get(name)]
    return words + re.findall("1717|3939", json.dumps(turn.get("tool_calls", "")))


def published(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield package, name and text of each template in the packages of a folder; of equal texts the first."""
    seen = set()
    for path in sorted(folder.iterdir()):
        package = re.split(r"-\d", path.name)[0]
        texts: list[tuple[str, bytes]] = []
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                texts = [(name, archive.read(name)) for name in sorted(archive.namelist()) if name.endswith(".jinja")]
        elif path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(".jinja"):
                        texts.append((member.name, archive.extractfile(member).read()))  # type: ignore[union-attr]
        for name, raw in sorted(texts):
            text = raw.decode()
            if "messages" in text and text not in seen:
                seen.add(text)
                yield package, Path(name).stem, text


class Judge:
    """What is right, found with transformers alone."""

    def __init__(self, template: str, special: dict[str, str]) -> None:
        self.template, self.special = template, special

    def render(self, messages: Any, tools: Any, prompt: bool = False) -> str | None:
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {"tools": tools, "add_generation_prompt": prompt, **self.special}
        try:
            rendered: Any = render_jinja_template([messages], chat_template=self.template, **options)
        except Exception:  # noqa: BLE001  a template may raise anything
            return None
        return rendered[0][0]

    def can_mask(self, messages: list[Any], tools: Any) -> bool:
        """Whether each turn, as the last of its chat, shows all of its words, and a token ends it."""
        for i, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            text = self.render(messages[: i + 1], tools)
            if text is None or not all(word in text for word in words_of(turn)):
                return False
            last = max((text.rfind(word) + len(word) for word in words_of(turn)), default=len(text))
            if not END.search(text, last):
                return False
        return self.render(messages, tools) is not None

    def fault(self, messages: list[Any], tools: Any, i: int, before: str, span: str) -> str | None:
        """Say what is wrong with the span of turn i behind the text `before`; None if nothing is."""
        turn = messages[i]
        words = words_of(turn)
        for word in words:
            if word not in span:
                return f"{word!r} is not trained"
        others = {word for k, other in enumerate(messages) if k != i for word in words_of(other)}
        for word in others - set(words):
            if word in span:
                return f"{word!r} of another turn is trained"
        last = max((span.rfind(word) + len(word) for word in words), default=0)
        ends = list(END.finditer(span, last))
        if not ends or ends[-1].end() != len(span):
            return f"does not end in a token that ends turns: {span[-40:]!r}"
        # The same history may be given in several forms: whichever of them it was, it must be what stands before.
        first_fault = None
        for variant in variants(messages[:i]) if i else ():
            asked = self.render(variant, tools, prompt=True)
            if asked is None:
                continue
            fault = self.fault_before(before, asked)
            if fault is None:
                return None
            first_fault = first_fault or fault
        return first_fault

    def fault_before(self, before: str, asked: str) -> str | None:
        """Say how the text before a span differs from what the model is given at inference."""
        asked, before = OPENED.sub("", asked), OPENED.sub("", before)
        if not (before.startswith(asked) or asked.startswith(before)):
            at = next(k for k, (a, b) in enumerate(zip(before, asked, strict=False)) if a != b)
            return f"another text before it than at inference: {before[at:][:60]!r}, not {asked[at:][:60]!r}"
        rest = asked[len(before) :].strip()
        # The generation prompt may hold an empty reasoning that the turn itself does not show (Gemma 4).
        if rest and not re.fullmatch(r"(?:<[^<>]*>|\[[^\]]*\]|thought|\s)*", rest):
            return f"{rest!r} of the generation prompt is trained"
        return None


def variants(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages with arguments as text and as objects, contents as strings and parts, empty or null."""
    given: list[Any] = []
    for as_text in (None, True, False):
        for empty in ("given", "", None, "absent"):
            for as_parts in (None, False, True):
                varied = json.loads(json.dumps(messages))
                for message in varied:
                    for call in message.get("tool_calls", []):
                        arguments = call["function"]["arguments"]
                        if as_text is True and not isinstance(arguments, str):
                            call["function"]["arguments"] = json.dumps(arguments)
                        elif as_text is False and isinstance(arguments, str):
                            call["function"]["arguments"] = json.loads(arguments)
                    content = message.get("content")
                    if not content and empty != "given":
                        message["content"] = empty
                        if empty == "absent":
                            del message["content"]
                    elif isinstance(content, list) and as_parts is False:
                        message["content"] = content[0]["text"]
                    elif content and isinstance(content, str) and as_parts is True:
                        message["content"] = [{"type": "text", "text": content}]
                if varied not in given:
                    given.append(varied)
                    yield varied


@functools.lru_cache(maxsize=1)
def finder_and_judge(template: str, byte_level: bool) -> tuple[SpanFinder, Judge]:
    """Build both sides of the comparison for a template."""
    tokenizer = build_tokenizer(None, byte_level=byte_level)
    bos, eos = "<s>", "</s>"
    for token in (
        "<|im_end|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<｜end▁of▁sentence｜>",
        "<|return|>",
        "<eos>",
        "<|end|>",
    ):
        if token in template and "eos_token" not in template:
            eos = token
            break
    tokens = sorted(set(CONTROL.findall(template)) | {bos, eos})
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, eos, template
    special = {"bos_token": bos, "eos_token": eos, "pad_token": str(tokenizer.pad_token)}
    return SpanFinder(ChatFormat.from_tokenizer(tokenizer)), Judge(template, special)


def judge(template: str, chat: dict[str, Any], byte_level: bool = True) -> tuple[str, str]:
    """Say how the trainer masks a chat: equal, wrong, refused (though it could be masked), or impossible; and why."""
    finder, oracle = finder_and_judge(template, byte_level)
    messages, tools = chat["messages"], chat.get("tools")
    try:
        samples = finder.samples(messages, tools)
    except TemplateError as error:
        return ("refused" if oracle.can_mask(messages, tools) else "impossible"), str(error)
    has_marks = "generation %}" in template
    spans = [(sample.text[:start], sample.text[start:stop]) for sample in samples for start, stop in sample.spans]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    # A split chat may hold its turns in another order.
    spans.sort(key=lambda pair: [not all(word in pair[1] for word in words_of(messages[i])) for i in turns])
    if len(spans) != len(turns):
        return ("by its marks", "several marks") if has_marks else ("wrong", f"{len(spans)} spans")
    for i, (before, span) in zip(turns, spans, strict=True):
        fault = oracle.fault(messages, tools, i, before, span)
        if fault is not None:
            return ("by its marks" if has_marks else "wrong"), fault
    return "equal", ""


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


def table_by_family(results: list[tuple[str, str, str, str]]) -> str:
    """Lay out outcomes (name of the template, shape, outcome, reason) by family, with the commonest refusals."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[str, set[str]] = defaultdict(set)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for name, _, outcome, why in results:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--every", type=int, default=1, help="take each n-th template only")
    parser.add_argument("--show", default="wrong,refused,traceback", help="outcomes to list")
    args = parser.parse_args()
    results = []
    found = [item for item in published(args.folder) if args.only in item[1]][:: args.every]
    for package, name, template in found:
        for shape, chat in shapes().items():
            try:
                outcome, why = judge(template, chat)
            except Exception as error:  # noqa: BLE001  that is what is looked for
                outcome, why = "traceback", repr(error)
            results.append((f"{package}/{name}", shape, outcome, why))
            if outcome in args.show.split(","):
                print(f"{outcome}: {package}/{name} · {shape}: {why[:200]}", flush=True)
    totals = Counter(outcome for _, _, outcome, _ in results)
    print(f"\n{table_by_family(results)}\n\n{len(found)} templates, {len(results):,} cases: {dict(totals)}")
    if totals["wrong"] or totals["traceback"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
