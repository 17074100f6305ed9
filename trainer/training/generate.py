"""Greedy answers to held-out chats, shared out over ranks: what the model says, beside what it should say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.atomic import hidden_path, write_file
from trainer.data.chat import ChatFormat, TemplateError
from trainer.data.jsonl import Document, read_documents
from trainer.data.messages import Message, content_text, roles_of
from trainer.data.spans import SpanFinder
from trainer.data.store import TokenStore
from trainer.data.turn_style import TurnStyle
from trainer.distributed.group import Group
from trainer.errors import DataError, OutputError, UsageError
from trainer.model.fsdp import inference
from trainer.model.prepared import Prepared
from trainer.training.run_dir import ANSWERS

_BATCH_SIZE = 64  # chats generated at a time on one rank


@dataclass(frozen=True)
class Question:
    """A held-out chat up to its last assistant turn: what was asked last, all of it as token ids, and that turn."""

    asked: str
    prompt_ids: list[int]
    reference: str


@dataclass
class Answer:
    """What the model said to a question."""

    asked: str
    reference: str
    answer: str
    scores: dict[str, float] = field(default_factory=dict)  # of the built-in scorers that were asked for

    @property
    def is_exact(self) -> bool:
        """Return whether the answer is the reference, white space at the ends aside."""
        return self.answer.strip() == self.reference.strip()


def questions_of(
    store: TokenStore,
    tokenizer: PreTrainedTokenizerBase,
    count: int | None,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Question]:
    """Read the chats behind the first `count` documents of a store (None: behind all of them).

    Raises:
        UsageError: the samples were not prepared from chats.
    """
    source, kind = store.metadata.get("source"), store.metadata.get("kind")
    if source is None or kind != "messages":
        raise UsageError(
            f"answers can be generated for data of kind 'messages' prepared in this run, not for {kind!r} data: "
            "leave eval_exact_match, score_answers and num_generation_samples off"
        )
    wanted = set(np.unique(store.documents)[:count].tolist())
    return [
        question_of(document, tokenizer, chat_template, chat_template_kwargs)
        for document in read_documents(source)
        if document.line in wanted
    ]


def write_answers(folder: Path, step: int, answers: Sequence[Answer]) -> None:
    """Write the answers of an evaluation to answers.jsonl, behind those of earlier steps.

    Lines of this step or later ones are replaced: a resumed run answers again.

    Raises:
        OutputError: the file cannot be written.
    """
    path = folder / ANSWERS
    lines: list[str] = []
    try:
        if path.is_file():
            former = path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in former if json.loads(line)["step"] < step]
        for number, each in enumerate(answers):
            line = {"step": step, "sample": number, "question": each.asked, "reference": each.reference}
            lines.append(json.dumps({**line, "answer": each.answer, **each.scores}, ensure_ascii=False))
        hidden = hidden_path(path)
        write_file(hidden, [(line + "\n").encode() for line in lines])
        hidden.replace(path)
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{path} cannot be written after step {step}: {error}") from error


def end_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Tokens that end an answer: EOS, by the tokenizer and by the model, and what the chat template ends turns with."""
    by_model = getattr(model.generation_config, "eos_token_id", None)
    ends: Sequence[str] = ()
    if tokenizer.chat_template is not None or chat_template is not None:
        ends = TurnStyle(ChatFormat.from_tokenizer(tokenizer, chat_template, chat_template_kwargs)).stop_tokens
    ids = [tokenizer.eos_token_id, *(by_model if isinstance(by_model, list) else [by_model])]
    return sorted({i for i in ids if i is not None} | {tokenizer.convert_tokens_to_ids(end) for end in ends})


def check_room(model: PreTrainedModel, questions: Sequence[Question], max_new_tokens: int) -> None:
    """Raise UsageError where an answer could outgrow the positions of the model."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(question.prompt_ids) for question in questions)
    if limit is not None and longest + max_new_tokens > limit:
        raise UsageError(
            f"generation_max_new_tokens = {max_new_tokens}: the longest held-out prompt has {longest} tokens, "
            f"the model has positions for {limit}; lower the one, or hold out shorter chats"
        )


def answer_questions(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    group: Group,
    max_new_tokens: int,
    ends: Sequence[int],
    **sampling: Any,
) -> list[Answer]:
    """Answer every question, up to one of the tokens `ends`; all ranks call it together, all get the answers.

    Greedily, unless `sampling` says otherwise to transformers' `generate`.
    """
    tokens = torch.zeros(len(questions), max_new_tokens, dtype=torch.long, device=group.device)
    model = prepared.model
    with prepared.in_use(), inference(model), prepared.compute_context():
        # Questions of like length together, so that little is padded.
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt_ids), i))
        size = _BATCH_SIZE * group.world_size
        for start in range(0, len(order), size):
            together = order[start : start + size]
            own = together[group.rank :: group.world_size]
            asked = own or together[:1]  # a rank without a question still takes part in the others' collectives
            prompts = [questions[i].prompt_ids for i in asked]
            rows = generate(model, tokenizer, prompts, group, max_new_tokens, ends, **sampling)
            tokens[own, : rows.shape[1]] = rows[: len(own)] + 1  # 0 stays where another rank answers
    rows = group.sum_tensor(tokens) - 1
    return [
        Answer(
            asked=question.asked,
            reference=question.reference,
            answer=tokenizer.decode([i for i in row if i >= 0 and i not in ends], skip_special_tokens=True),
        )
        for question, row in zip(questions, rows.tolist(), strict=True)
    ]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    group: Group,
    max_new_tokens: int,
    ends: Sequence[int],
    **sampling: Any,
) -> torch.Tensor:
    """Continue prompts, greedily unless `sampling` says otherwise.

    Args:
        model: a causal language model.
        tokenizer: its padding token fills shorter prompts.
        prompts: token ids.
        group: all ranks; sharded models generate together.
        max_new_tokens: the most tokens of an answer.
        ends: tokens that end an answer.
        sampling: what else transformers' `generate` takes, such as do_sample, temperature, top_p, streamer.

    Returns:
        The new tokens, (len(prompts), at most max_new_tokens).
    """
    width = max(map(len, prompts))
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)  # masked anyway
    input_ids = torch.full((len(prompts), width), padding)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(width) >= (width - lengths)[:, None]
    sequences = model.generate(
        input_ids=input_ids.to(group.device),
        attention_mask=mask.long().to(group.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        eos_token_id=list(ends) or None,
        use_cache=True,
        synced_gpus=group.world_size > 1,
        **({"do_sample": False} | sampling),
    )
    return sequences[:, width:]


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], chat_template: str | None
) -> list[int]:
    """Return the token ids from which the answer to a chat is generated.

    A tokenizer without a chat template continues the text of the last message.
    """
    if tokenizer.chat_template is None and chat_template is None:
        return list(tokenizer(str(messages[-1]["content"]))["input_ids"])
    text, _ = ChatFormat.from_tokenizer(tokenizer, chat_template).render(list(messages), None, True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def question_of(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Question:
    """Return a chat up to its last assistant turn, which is the reference.

    Raises:
        DataError: it has no such turn with text.
    """
    messages = document.fields["messages"]
    asked = [message.get("content") for message in messages if message["role"] == "user"]
    try:
        tools = document.fields.get("tools")
        prompt_ids, reference = generation_prompt(tokenizer, messages, tools, chat_template, chat_template_kwargs)
    except DataError as error:
        raise document.refusal(error.found, error.allowed, error.field) from error
    return Question(str(asked[-1] or "") if asked else "", prompt_ids, reference)


def generation_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], str]:
    """Return the token ids from which the last assistant turn is to be generated, and that turn's text."""
    turns = [i for i, role in enumerate(roles_of(messages)) if role == "assistant"]
    if not turns:
        raise DataError("found no assistant turn", "generation needs one as its reference", field="messages")
    reference = content_text(messages[turns[-1]])
    if not reference.strip():
        raise DataError("the last assistant turn has no text", "answers are compared as texts", field="messages")
    finder = SpanFinder(ChatFormat.from_tokenizer(tokenizer, chat_template, chat_template_kwargs))
    try:
        text = finder.prompt(messages[: turns[-1]], tools)
    except TemplateError as error:
        raise DataError(str(error), error.remedy, field="messages") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), reference
