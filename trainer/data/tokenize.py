"""Documents to samples: one pure function of a recipe and the lines of a file.

Owns the recipe (all that decides which tokens come out), the label mask, and the policies for over-long and untrainable
samples. Does not know processes, caches or stores. Invariant: every document ends as samples, as a count in the report,
or as a DataError. For pretraining, documents are joined with EOS and cut into blocks: laid end to end, the blocks are
the documents laid end to end, and only the last one may be shorter.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.chat import RENDER_BYTES, RENDER_SECONDS, ChatFormat, TemplateError
from trainer.data.encode import Encoded, Encoder
from trainer.data.jsonl import FIELDS, PRETRAIN_ROLE, Document, FileKind, agrees_on_loss_tokens, read_tokens
from trainer.data.limits import limited_work
from trainer.data.messages import is_nearly_assistant, is_written
from trainer.data.spans import Rendered, SpanFinder
from trainer.data.store import Sample, TokenBatch
from trainer.errors import TrainerError, UsageError
from trainer.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config.groups import DataArguments

RULES_VERSION = 5
"""Raised whenever the same line and options come to give other tokens or counts: what was cached is prepared anew."""

_NUM_DOCUMENTS_AT_ONCE = 512


@dataclass(frozen=True)
class Recipe:
    """All that decides which tokens come out of a line, as plain values: hashed for the cache, sent to processes."""

    expected: FileKind
    backend: str | None
    chat: ChatFormat | None
    vocabulary_size: int | None
    eos_id: int | None
    split_special_tokens: bool
    train_on: str
    split_chats: bool
    on_open_turn: str
    limit: int | None
    overlong: str
    on_untrainable: str
    block_size: int | None
    rules: int

    @classmethod
    def build(
        cls,
        expected: FileKind,
        tokenizer: PreTrainedTokenizerBase | None,
        args: DataArguments,
        limit: int | None,
    ) -> Recipe:
        """Gather what counts; refuse options that have no effect on data of this kind."""
        _check_options(expected, tokenizer, args, limit)
        bounds = [bound for bound in (args.max_length, limit) if bound is not None]
        return cls(
            expected=expected,
            **_tokenizer_facts(tokenizer, expected, args.chat_template, args.chat_template_kwargs),
            train_on=args.train_on,
            split_chats=args.split_chats,
            on_open_turn=args.on_open_turn,
            limit=None if args.block_size else min(bounds, default=None),
            overlong=args.overlong,
            on_untrainable=args.on_untrainable,
            block_size=args.block_size,
            rules=RULES_VERSION,
        )

    def to_json(self) -> str:
        """Write the recipe; equal recipes give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        if fields["chat"] is not None:
            fields["chat"]["added_tokens"] = tuple(fields["chat"]["added_tokens"])
            fields["chat"] = ChatFormat(**fields["chat"])
        return cls(**{**fields, "expected": FileKind(**fields["expected"])})


class DocumentTokenizer:
    """A recipe at work."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def _encoder(self) -> Encoder:
        assert self.recipe.backend is not None
        return Encoder(self.recipe.backend, self.recipe.split_special_tokens)

    @cached_property
    def _finder(self) -> SpanFinder | None:
        recipe = self.recipe
        if recipe.chat is None:
            return None
        return SpanFinder(recipe.chat, recipe.split_chats, recipe.on_open_turn == "close")

    def load(self) -> None:
        """Load what the first document would otherwise wait for, about a second."""
        if self.recipe.backend is not None:
            self._encoder  # noqa: B018
        if self._finder is not None:
            self._finder.style.stop_tokens  # noqa: B018

    def tokenize(self, documents: Iterable[Document]) -> tuple[TokenBatch, Counter[str]]:
        """Return the samples of the documents in order, and the counts of what happened to them."""
        report: Counter[str] = Counter()
        samples: list[Sample] = []
        lines: list[int] = []
        for group in _groups(documents):
            for document, sample in self._read(group, report):
                kept = self._apply_policies(document, sample, report)
                samples += kept
                lines += [document.line] * len(kept)
        return TokenBatch.join(samples, lines), report

    def _read(self, documents: Sequence[Document], report: Counter[str]) -> list[tuple[Document, Sample]]:
        report["documents"] += len(documents)
        known = FIELDS[self.recipe.expected.kind]
        report.update(f"ignored_field:{name}" for document in documents for name in document.fields.keys() - known)
        if self.recipe.expected.kind == "tokens":
            return [(document, self._read_tokens(document, report)) for document in documents]
        has_control_text = self._encoder.has_control_text
        report["control_tokens_in_text"] += sum(any(map(has_control_text, _contents(d))) for d in documents)
        sources: list[Document] = []
        rendered: list[Rendered] = []
        with limited_work(RENDER_SECONDS, RENDER_BYTES):  # each of them
            for document in documents:
                samples = self._render(document, report)
                rendered += samples
                sources += [document] * len(samples)
        encoded = self._encoder.encode([item.text for item in rendered], [item.spans for item in rendered])
        labelled = []
        for document, item, (ids, mask) in zip(sources, rendered, encoded, strict=True):
            raw = _raw_text(document) is not None
            if raw:
                ids, mask = self._with_ends(ids, mask)
            else:
                self._check_ends(document, item, ids, mask)
            role = "text" if raw else "all" if self.recipe.train_on == "all" else "assistant"
            report[f"trained_tokens:{role}"] += int(np.count_nonzero(mask[1:]))
            labelled.append((document, Sample(ids, np.where(mask, ids, np.int32(IGNORE_INDEX)))))
        return labelled

    def _read_tokens(self, document: Document, report: Counter[str]) -> Sample:
        sample = Sample(*read_tokens(document, self.recipe.vocabulary_size))
        report["stated_loss_tokens_differ"] += not agrees_on_loss_tokens(document, sample.labels)
        return sample

    def _render(self, document: Document, report: Counter[str]) -> list[Rendered]:
        raw = _raw_text(document)
        if raw is not None:
            report["turns_without_end_of_turn"] += self.recipe.eos_id is None
            start = 0 if self.recipe.train_on == "all" else len(raw[0])
            return [Rendered("".join(raw), ((start, len(raw[0]) + len(raw[1])),))]
        fields, is_chat = document.fields, document.kind == "messages"
        prompt = [] if is_chat else fields["prompt"]
        messages = fields["messages"] if is_chat else prompt + fields["completion"]
        self._check_roles(document, messages, len(prompt), report)
        try:
            if self._finder is None:
                raise TemplateError("the tokenizer has no chat template", "give one with chat_template=FILE")
            samples = self._finder.samples(messages, fields.get("tools"), self.recipe.train_on, len(prompt))
        except TemplateError as error:
            raise document.refusal(str(error), error.remedy, "messages" if is_chat else "completion") from error
        report["trained_turns:assistant"] += sum(sample.num_turns for sample in samples)
        report["turns_without_end_of_turn"] += sum(sample.num_open_turns for sample in samples)
        report["open_turns_closed"] += sum(sample.num_closed_turns for sample in samples)
        report["marks_that_cover_a_header"] += sum(sample.num_marked_headers for sample in samples)
        report["chats_split"] += len(samples) > 1
        report["samples_of_split_chats"] += len(samples) if len(samples) > 1 else 0
        shown = max(sample.num_messages for sample in samples)
        report["messages_after_trained_turns_left_out"] += len(messages) - shown
        written = "\0".join(sample.text for sample in samples)
        report["messages_not_written_whole"] += sum(not is_written(message, written) for message in messages[:shown])
        return samples

    def _check_roles(
        self, document: Document, messages: Sequence[dict[str, Any]], num_prompt: int, report: Counter[str]
    ) -> None:
        """Count messages by role; refuse roles that are meant to be 'assistant', which would not be trained."""
        for i, message in enumerate(messages):
            role = message["role"]
            report[f"messages:{role}"] += 1
            if role != "assistant" and is_nearly_assistant(role):
                place = f"messages[{i}]"
                if document.kind != "messages":
                    place = f"prompt[{i}]" if i < num_prompt else f"completion[{i - num_prompt}]"
                allowed = "the model's turns are trained only under the role 'assistant': rename it"
                raise document.refusal(f"found the role {role!r}", allowed, f"{place}.role")

    def _check_ends(self, document: Document, item: Rendered, ids: Any, mask: Any) -> None:
        """Hold the ids against what the text promised: each trained run ends in a token that stops the model."""
        if self.recipe.train_on == "all" or item.num_open_turns or not item.spans or self._finder is None:
            return
        last_of_run = ids[mask & ~np.append(mask[1:], False)]
        if not np.isin(last_of_run, self._stop_ids).all():
            raise document.refusal(
                "the tokenizer joins the end of a turn with what follows it",
                f"tokens that end turns ({', '.join(self._finder.style.stop_tokens)}) must be added tokens",
            )

    def _with_ends(self, ids: Any, mask: Any) -> Encoded:
        """Put around a raw text what the tokenizer puts there, and EOS at its end; nothing twice."""
        prefix, suffix = self._encoder.prefix, self._encoder.suffix
        if prefix and list(ids[: len(prefix)]) == prefix:
            prefix = []
        if self.recipe.eos_id is not None and self.recipe.eos_id not in suffix:
            suffix = [*suffix, self.recipe.eos_id]
        if suffix and list(ids[-len(suffix) :]) == suffix:
            suffix = []
        whole = np.concatenate([np.array(prefix, np.int32), ids, np.array(suffix, np.int32)])
        before = np.full(len(prefix), bool(mask.all()))
        return whole.astype(np.int32), np.concatenate([before, mask, np.ones(len(suffix), bool)])

    @cached_property
    def _stop_ids(self) -> list[int]:
        assert self._finder is not None
        return self._encoder.token_ids(self._finder.style.stop_tokens)

    def _apply_policies(self, document: Document, sample: Sample, report: Counter[str]) -> list[Sample]:
        if self.recipe.block_size:
            return [sample]
        if not _is_trainable(sample):
            if self.recipe.on_untrainable == "error":
                raise _untrainable(document, self.recipe)
            report["untrainable_dropped"] += 1
            return []
        if self.recipe.limit is None or len(sample.input_ids) <= self.recipe.limit:
            return [sample]
        pieces = self._shorten(document, sample, self.recipe.limit, report)
        kept = [piece for piece in pieces if _is_trainable(piece)]
        report["untrainable_pieces_dropped"] += len(pieces) - len(kept)
        return kept

    def _shorten(self, document: Document, sample: Sample, limit: int, report: Counter[str]) -> list[Sample]:
        length, policy = len(sample.input_ids), self.recipe.overlong
        if policy == "error":
            allowed = f"at most {limit:,} tokens are allowed (max_length, or the token budget)"
            remedy = "raise it, or choose overlong=drop, truncate or split"
            raise document.undecided(f"found a sample of {length:,} tokens", f"{allowed}; {remedy}")
        if policy == "drop":
            report.update(overlong_dropped=1, tokens_dropped=length)
            return []
        if policy == "truncate":
            report.update(overlong_truncated=1, tokens_truncated=length - limit)
            return [Sample(sample.input_ids[:limit], sample.labels[:limit])]
        pieces = _split(sample, limit)
        report.update(overlong_split=1, split_pieces=len(pieces))
        return pieces


def _split(sample: Sample, limit: int) -> list[Sample]:
    """Cut into pieces of at most `limit` tokens, each beginning with the last token of the one before as context.

    So every label that was trained is trained in exactly one piece.
    """
    begins = range(0, len(sample.input_ids) - 1, limit - 1)
    return [Sample(sample.input_ids[b : b + limit], _masked_first(sample.labels[b : b + limit])) for b in begins]


def _masked_first(labels: Any) -> Any:
    return np.concatenate([np.full(1, IGNORE_INDEX, np.int32), labels[1:]])


def _is_trainable(sample: Sample) -> bool:
    return bool((sample.labels[1:] != IGNORE_INDEX).any())


def _untrainable(document: Document, recipe: Recipe) -> TrainerError:
    messages = document.fields.get("messages") or document.fields.get("completion")
    roles = ", ".join(str(m["role"]) for m in messages[:8]) if isinstance(messages, list) else None
    found = "found no token to train" + (f" (roles: {roles}; train_on={recipe.train_on!r})" if roles else "")
    allowed = "a sample needs at least one trained token after its first; or choose on_untrainable=drop"
    return document.undecided(found, allowed)


def _raw_text(document: Document) -> tuple[str, str] | None:
    """The untrained and the trained part of a document that is no chat."""
    fields = document.fields
    if document.kind == "text":
        return "", fields["text"]
    if document.kind == "messages":
        message = fields["messages"][0]
        return ("", message["content"]) if message["role"] == PRETRAIN_ROLE else None
    return (fields["prompt"], fields["completion"]) if isinstance(fields["prompt"], str) else None


def _contents(document: Document) -> Iterator[str]:
    """What its author wrote, without what the template writes around it."""
    for value in map(document.fields.get, FIELDS[document.kind]):
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (
                text for message in value for name in message if name != "role" for text in _texts(message[name])
            )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == _NUM_DOCUMENTS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _check_options(
    expected: FileKind, tokenizer: PreTrainedTokenizerBase | None, args: DataArguments, limit: int | None
) -> None:
    kind = expected.kind
    if kind == "tokens" and args.train_on != "assistant":
        raise UsageError(f"train_on={args.train_on!r} has no effect: the data is tokenized, its labels decide")
    if kind == "text" and args.train_on == "last":
        raise UsageError("train_on='last' has no effect on 'text': all of it is trained")
    if kind in ("tokens", "text"):
        without_effect = {
            "chat_template": args.chat_template is not None,
            "chat_template_kwargs": bool(args.chat_template_kwargs),
            "split_chats": not args.split_chats,
            "on_open_turn": args.on_open_turn != "close",
        }
        for name, is_set in without_effect.items():
            if is_set:
                raise UsageError(f"{name} has no effect on data of kind {kind!r}")
    if tokenizer is None and (kind != "tokens" or args.block_size):
        raise UsageError(f"a tokenizer is needed to prepare data of kind {kind!r}, and for block_size")
    if args.block_size and tokenizer is not None and tokenizer.eos_token_id is None:
        raise UsageError("block_size joins documents with EOS, but the tokenizer has no eos_token")
    if args.block_size and limit is not None and args.block_size > limit:
        raise UsageError(f"block_size={args.block_size} is more than the {limit} tokens that one rank can hold")
    if args.block_size and args.max_length is not None:
        raise UsageError("max_length has no effect with block_size: every sample is a block")
    if args.block_size and (args.overlong, args.on_untrainable) != ("error", "error"):
        raise UsageError("overlong and on_untrainable have no effect with block_size: every sample is a block")
    if args.overlong == "split" and min(args.max_length or 2, limit or 2) < 2:
        raise UsageError("overlong='split' needs room for two tokens: one of context and one to train")


def _tokenizer_facts(
    tokenizer: PreTrainedTokenizerBase | None,
    expected: FileKind,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any],
) -> dict[str, Any]:
    if tokenizer is None:
        names = ("backend", "chat", "vocabulary_size", "eos_id")
        return {**dict.fromkeys(names), "split_special_tokens": False}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None and expected.kind != "tokens":
        raise UsageError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: only those with a tokenizer.json are read"
        )
    has_chats = expected.kind in ("messages", "prompt_completion")
    wanted = has_chats and (tokenizer.chat_template is not None or chat_template is not None)
    return {
        "backend": None if expected.kind == "tokens" else backend.to_str(),
        "chat": ChatFormat.from_tokenizer(tokenizer, chat_template, chat_template_kwargs) if wanted else None,
        "vocabulary_size": len(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }


def end_with_eos(batch: TokenBatch, eos_id: int) -> TokenBatch:
    """Put EOS behind every document that does not end with it; trained if the document's last token is."""
    ends = np.cumsum(batch.lengths, dtype=np.int64)
    last = np.maximum(ends - 1, 0)
    lacks = batch.lengths == 0
    lacks[~lacks] = batch.input_ids[last[~lacks]] != eos_id
    label = np.full(len(ends), eos_id, np.int32)
    masked = batch.lengths > 0
    label[masked] = np.where(batch.labels[last[masked]] == IGNORE_INDEX, IGNORE_INDEX, eos_id)
    return TokenBatch(
        np.insert(batch.input_ids, ends[lacks], eos_id).astype(np.int32, copy=False),
        np.insert(batch.labels, ends[lacks], label[lacks]).astype(np.int32, copy=False),
        (batch.lengths + lacks).astype(np.int32),
        batch.documents,
    )


class BlockCutter:
    """Takes documents in batches and gives full blocks; what is left over waits for the next batch."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._rest = TokenBatch.join([], [])

    def cut(self, batch: TokenBatch) -> TokenBatch:
        """Add documents; return the blocks that are full, each under the document in which it begins."""
        ids = np.concatenate([self._rest.input_ids, batch.input_ids])
        labels = np.concatenate([self._rest.labels, batch.labels])
        documents = np.concatenate([self._rest.documents, np.repeat(batch.documents, batch.lengths)])
        num_blocks = len(ids) // self.block_size
        cut = num_blocks * self.block_size
        ones = np.ones(len(ids) - cut, np.int32)
        self._rest = TokenBatch(ids[cut:], labels[cut:], ones, documents[cut:])
        lengths = np.full(num_blocks, self.block_size, np.int32)
        return TokenBatch(ids[:cut], labels[:cut], lengths, documents[: cut : self.block_size])

    def finish(self) -> TokenBatch:
        """Return the last, partial block, if anything is left."""
        rest, self._rest = self._rest, TokenBatch.join([], [])
        if not len(rest.input_ids):
            return rest
        return TokenBatch.join([Sample(rest.input_ids, rest.labels)], [int(rest.documents[0])])
