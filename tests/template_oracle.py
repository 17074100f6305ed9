"""What is right in a rendered chat, found with transformers alone: this module imports nothing of the trainer.

Each turn is known by its words, the end of a turn by the names that published templates give it, and what stands before
a turn by the generation prompt.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

# Tokens that end what a model writes, in the templates that are published.
_NAMES = (
    r"im_end|eot_id|eom_id|eom|message_sep|tools_suffix|end_of_turn|eot|end|return|call|endoftext|end_of_text|"
    r"END_OF_TURN_TOKEN|eos|/s|turn\||assistant_end|end_of_sentence|end▁?of▁?sentence|im_sep_end|eod|EOT|end_message|"
    r"turn_end|message_end|endofprompt|role_end|end_of_role|seed:eos|separator|sep|eoa|EOS|endofturn|end_of_msg|msg_end|"
    # Idefics and SmolVLM; tool calls of Solar and HyperCLOVA; Nemotron Nano 2 and Apertus 1.1, whose EOS is reserved.
    r"end_of_utterance|calls|stop|SPECIAL_12|SPECIAL_68|"
    # Models of fewer users: LongCat, Solar Open, Hunyuan, CodeLlama 70B, Ghost.
    r"/longcat_s|im:end|hy_eos|hy_place▁?holder▁?no▁?2|hy_Assistant|eos:\w+|step|END|endofmessage|cos|mend|/assistant|end_turn"
)
# Tokens that begin the next message: the model stops there if nothing ended its turn before.
_NEXT = r"extra_id_1|user|observation|system|tool_response|start_function_response"
END = re.compile(rf"(?:<[|｜]?(?:{_NAMES}|{_NEXT})[|｜]?>|\[(?:EOT|e~\[|/?s)\]|</s>|\[e~\[|<eos>|\[\|endofturn\|\])")
NEXT = re.compile(rf"<[|｜]?(?:{_NEXT})[|｜]?>\Z")
# Words that a template writes behind a turn, as those of models that judge a chat do.
WORDS = re.compile(r"\w\W*\s\W*\w")
CONTROL = re.compile(
    r"<[|｜][^<>{}'\"]{1,40}[|｜]>|<[a-zA-Z_▁:/][\w▁:/|]{1,30}>|\[/?[A-Z_]{2,24}\]|\[gMASK\]|<[a-z_]+\|>|<\|[a-z_\"]+>|\[e~\[|\]~b\]|\[\|[a-z]+\|\]"
)
OPENED = re.compile(
    r"(?:<[\w:|]*(?:think|thought|reason|START_THINKING|inner_prefix)[\w:|]*>|\[THINK\])\s*\Z"
    r"|Here ?are ?my ?reasoning ?steps:\s*\Z|<\|channel>thought\s*\Z"
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
    developer = {"role": "developer", "content": "Be brief"}

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
    second = call({"a": 3939}, name="call00002")
    lines = "Reply one\n\n```python\nx = 1\n```\n- Reply three"
    pieces = [{"type": "text", "text": "Reply one"}, {"type": "text", "text": "Reply three"}]
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
        "think, middle only": [u[0], a[0], u[1], t[1], u[2], a[2]],
        "reasoning, three turns": [u[0], r[0], u[1], r[1], u[2], r[2]],
        "reasoning, then none": [u[0], r[0], u[1], a[1], u[2], r[2]],
        "developer": [developer, u[0], a[0]],
        "system in the middle": [u[0], a[0], s, u[1], a[1]],
        "users in a row": [u[0], u[1], a[0]],
        "three in a row": [u[0], *a],
        "many lines": [u[0], {**a[0], "content": lines}],
        "several parts": [u[0], {**a[0], "content": pieces}],
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
        "call in the second turn": [u[0], a[0], u[1], call({"a": 1717}), result, a[1]],
        "calls one after another": [u[0], call({"a": 1717}), result, second, result2, a[0]],
        "reasoned calls one after another": [
            u[0],
            *({**call({"a": 1717}), "reasoning_content": "Because alpha."}, result),
            *({**second, "reasoning_content": "Because beta."}, result2),
            r[2],
        ],
        "calls beside text, another turn": [
            s,
            u[0],
            *(call({"a": 1717}, "Reply six"), result),
            *(call({"a": 3939}, "Reply seven", "call00002"), result2),
            *(a[0], u[1], a[1]),
        ],
        "call without a result": [u[0], call({"a": 1717}), u[1], a[0]],
        "tools unused, reasoning": [u[0], r[0], u[1], r[1]],
        "tools unused, assistant first": [a[0], u[0], a[1]],
        "reasoned call": [u[0], {**call({"a": 1717}), "reasoning_content": "Because delta."}, result, a[0]],
    }
    chats: dict[str, dict[str, Any]] = {name: {"messages": messages} for name, messages in named.items()}
    chats |= {name: {"messages": messages, "tools": TOOLS} for name, messages in with_tools.items()}
    return chats


def words_of(turn: dict[str, Any]) -> list[str]:
    """What must be in the text of a turn."""
    content = turn.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    words = [line.strip() for line in re.split(r"</?think>|\n", content) if line.strip()]
    words += [turn[name] for name in ("reasoning_content",) if turn.get(name)]
    return words + re.findall("1717|3939", json.dumps(turn.get("tool_calls", "")))


def squeezed(text: str) -> str:
    """Return the text without spaces, and without the letter that stands for one."""
    return "".join(text.replace("▁", " ").split())


def as_written(word: str, text: str) -> bool:
    """Whether a word is in a text, which may have lost its spaces."""
    return word in text or squeezed(word) in text


def end_of_turn(text: str, last: int) -> int | None:
    """Return where the first token that ends turns ends, from a place on; None if there is none."""
    found = END.search(text, last)
    return found.end() if found else None


class Judge:
    """What is right; not `exact`: of texts that may have lost their spaces."""

    def __init__(self, template: str, special: dict[str, str], exact: bool = True) -> None:
        self.template, self.special, self.exact = template, special, exact

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
            end = END.search(text, last)
            if not end or not turn.get("tool_calls") and WORDS.search(CONTROL.sub("", text[last : end.start()])):
                return False
        return self.render(messages, tools) is not None

    def fault(self, messages: list[Any], tools: Any, i: int, before: str, span: str) -> str | None:
        """Say what is wrong with the span of turn i behind the text `before`; None if nothing is."""
        turn = messages[i]
        words = words_of(turn)
        if not self.exact:
            words, before, span = [squeezed(word) for word in words], squeezed(before), squeezed(span)
        for word in words:
            if word not in span:
                return f"{word!r} is not trained"
        others = {word for k, other in enumerate(messages) if k != i for word in words_of(other)}
        for word in others - set(words_of(turn)):
            if as_written(word, span):
                return f"{word!r} of another turn is trained"
        last = max((span.rfind(word) + len(word) for word in words), default=0)
        ends = list(END.finditer(span, last))
        if not ends or ends[-1].end() != len(span):
            return f"does not end in a token that ends turns: {span[-40:]!r}"
        if NEXT.search(span) and len(ends) > 1 and not span[ends[-2].end() : ends[-1].start()].strip():
            return f"goes on behind its end: {span[-40:]!r}"
        # The same history may be given in several forms: whichever of them it was, it must be what stands before.
        first_fault = None
        for variant in variants(messages[:i]) if i else ():
            asked = self.render(variant, tools, prompt=True)
            if asked is None:
                continue
            fault = self.fault_before(before, asked)
            header = asked[len(os.path.commonprefix([asked, self.render(variant, tools) or asked])) :]
            header = OPENED.sub("", header).strip()
            if header and span.strip().startswith(header if self.exact else squeezed(header)):
                fault = fault or f"begins with the header: {span[:40]!r}"
            if fault is None:
                return None
            first_fault = first_fault or fault
        return first_fault

    def fault_before(self, before: str, asked: str) -> str | None:
        """Say how the text before a span differs from what the model is given at inference."""
        asked, before = OPENED.sub("", asked), OPENED.sub("", before)
        if not self.exact:
            asked, before = squeezed(asked), squeezed(before)
        if not (before.startswith(asked) or asked.startswith(before)):
            at = next(k for k, (a, b) in enumerate(zip(before, asked, strict=False)) if a != b)
            return f"another text before it than at inference: {before[at:][:60]!r}, not {asked[at:][:60]!r}"
        rest = asked[len(before) :].strip()
        # The generation prompt may hold an empty reasoning that the turn itself does not show (Gemma 4).
        if rest and not re.fullmatch(
            r"(?:[<\[][^<>]*(?:think|THINK|thought|reason|channel|inner)[^<>]*[>\]]|thought|\s)*", rest
        ):
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
