"""`trainer generate`: answers of one or several models to a prompt, to a file of chats, or in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.check import check_place
from trainer.cli.parse import parse_alone, positional
from trainer.config.fields import option
from trainer.distributed.topology import Topology
from trainer.errors import ModelError, UsageError

if TYPE_CHECKING:
    from trainer.distributed.group import Group
    from trainer.training.saved_model import SavedModel

Messages = list[dict[str, Any]]


@dataclass
class GenerateOptions:
    """Answer a prompt, the questions of a file, or in the terminal; several models one after the other."""

    models: list[str] = positional("A run, a checkpoint, a Hugging Face folder or a hub name; several answer in turn.")
    prompt: str | None = option(None, "The question; without it and without --data-path, a chat in the terminal.")
    data_path: str | None = option(None, "Chats or prompts as JSONL: each up to its last assistant turn is answered.")
    system: str | None = option(None, "A system prompt for --prompt and for a chat in the terminal.")
    chat_template: str | None = option(None, "A Jinja file instead of the tokenizer's chat template.")
    max_new_tokens: int = option(256, "Longest answer, in tokens.", above=0)
    temperature: float = option(0.0, "0 is greedy; else answers are sampled at this temperature.", minimum=0)
    top_p: float = option(1.0, "Sample from the likeliest tokens that have this much probability together.", above=0)
    top_k: int = option(0, "Sample from so many likeliest tokens; 0: from all.", minimum=0)
    seed: int = option(42, "Seed of sampling.")
    bf16: bool = option(False, "Compute in bfloat16.")
    use_cpu: bool = option(False, "Stay on the CPU although a GPU is there.")
    trust_remote_code: bool = option(False, "Run code that comes with a model of the hub.")


def run(words: Sequence[str]) -> int:
    """Load, answer, print; return the exit code."""
    options = parse_alone("trainer generate", words, GenerateOptions)
    if not options.models:
        raise UsageError("MODELS is missing: name a run, a checkpoint, a Hugging Face folder or a hub name")
    if options.prompt is not None and options.data_path is not None:
        raise UsageError("--prompt and --data-path exclude each other: give one")
    if options.data_path is not None and not Path(options.data_path).is_file():
        raise UsageError(f"data_path = {options.data_path!r} is no file")
    for place in options.models:
        check_place("models", place)
    num_processes = Topology.from_environment().world_size
    if num_processes > 1 and options.data_path is None:
        raise UsageError(
            f"one chat is answered by one process, and there are {num_processes}: start it without torchrun, or give "
            "--data-path, whose chats ranks share"
        )

    from transformers import set_seed
    from transformers.utils import logging

    from trainer.config.groups import MachineArguments
    from trainer.distributed.group import Group
    from trainer.optim.adapters import averaged_weights
    from trainer.training.saved_model import open_saved_model

    logging.disable_progress_bar()
    set_seed(options.seed)
    with (
        Group.join(MachineArguments(use_cpu=options.use_cpu)) as group,
        group.naming_faults(lambda: "generation"),
        ExitStack() as stack,
    ):
        models = []
        for place in options.models:
            code = options.trust_remote_code
            saved = open_saved_model(place, group.device, is_bf16=options.bf16, trust_remote_code=code)
            if saved.tokenizer is None:
                raise ModelError(f"{saved.place} has no tokenizer: generation needs one")
            stack.enter_context(averaged_weights(saved.optimizer))
            stack.enter_context(saved.prepared.in_use())
            saved.prepared.model.eval()
            models.append(saved)
        if options.data_path is not None:
            answer_file(models, options, group)
        elif options.prompt is not None:
            messages = [*opening(options), {"role": "user", "content": options.prompt}]
            for saved in models:
                show_title(saved, models)
                answer(saved, messages, options, group)
        else:
            chat(models, options, group)
    return 0


def opening(options: GenerateOptions) -> Messages:
    """Return what a chat begins with."""
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def sampling_of(options: GenerateOptions) -> dict[str, Any]:
    """Return what transformers' `generate` is told of sampling."""
    if options.temperature == 0:
        return {}
    return {
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
    }


def show_title(saved: SavedModel, models: Sequence[SavedModel]) -> None:
    """Say which model answers, where there are several."""
    if len(models) > 1:
        print(f"[{saved.place}]")


def answer(saved: SavedModel, messages: Messages, options: GenerateOptions, group: Group) -> str:
    """Answer a chat; print the answer as it comes, and return it."""
    import torch
    from transformers import TextStreamer

    from trainer.training.generate import end_ids, generate, prompt_of

    tokenizer = saved.tokenizer
    assert tokenizer is not None
    ends = end_ids(saved.prepared.model, tokenizer, options.chat_template)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    prompt = prompt_of(tokenizer, messages, options.chat_template)
    with torch.no_grad(), saved.prepared.compute_context():
        rows = generate(
            saved.prepared.model,
            tokenizer,
            [prompt],
            group,
            options.max_new_tokens,
            ends,
            streamer=streamer,
            **sampling_of(options),
        )
    return str(tokenizer.decode([i for i in rows[0].tolist() if i not in ends], skip_special_tokens=True))


def chat(models: Sequence[SavedModel], options: GenerateOptions, group: Group) -> None:
    """Chat in the terminal until end of file; /reset begins anew. Each model has a conversation of its own."""
    if sys.stdin.isatty():
        print("a line is a question; /reset begins a new chat, Ctrl-D ends", file=sys.stderr)
    conversations = [opening(options) for _ in models]
    for line in lines_of_terminal():
        if line.strip() == "/reset":
            conversations = [opening(options) for _ in models]
            continue
        if not line.strip():
            continue
        for saved, messages in zip(models, conversations, strict=True):
            messages.append({"role": "user", "content": line})
            show_title(saved, models)
            messages.append({"role": "assistant", "content": answer(saved, messages, options, group)})


def lines_of_terminal() -> Iterator[str]:
    """Return what is typed, line by line, until end of file."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def answer_file(models: Sequence[SavedModel], options: GenerateOptions, group: Group) -> None:
    """Answer the chats of a file; print one JSON object a line, with the answer of each model."""
    from trainer.data.jsonl import read_documents
    from trainer.training.generate import Question, answer_questions, end_ids, prompt_of, question_of

    assert options.data_path is not None
    answers: list[list[str]] = []
    questions: list[Question] = []
    for saved in models:
        tokenizer = saved.tokenizer
        assert tokenizer is not None
        questions = []
        for document in read_documents(options.data_path):
            if "messages" in document.fields:
                questions.append(question_of(document, tokenizer, options.chat_template))
            elif isinstance(document.fields.get("prompt"), str):
                asked = document.fields["prompt"]
                messages = [*opening(options), {"role": "user", "content": asked}]
                prompt = prompt_of(tokenizer, messages, options.chat_template)
                questions.append(Question(asked, prompt, str(document.fields.get("completion", ""))))
            else:
                raise document.refusal(f"fields {', '.join(document.fields)}", "give messages, or prompt")
        ends = end_ids(saved.prepared.model, tokenizer, options.chat_template)
        given = answer_questions(
            saved.prepared, tokenizer, questions, group, options.max_new_tokens, ends, **sampling_of(options)
        )
        answers.append([each.answer for each in given])
    if not group.is_main:
        return
    for number, question in enumerate(questions):
        line = {"question": question.asked, "reference": question.reference}
        if len(models) == 1:
            print(json.dumps({**line, "answer": answers[0][number]}, ensure_ascii=False))
        else:
            by_model = {saved.place: texts[number] for saved, texts in zip(models, answers, strict=True)}
            print(json.dumps({**line, "answers": by_model}, ensure_ascii=False))
