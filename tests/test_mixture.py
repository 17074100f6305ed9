"""Mixtures: an epoch holds what an oracle says, on any number of ranks and after any resume; views of the data."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.corpora import chat, random_chats, write_jsonl
from tests.fixtures.models import tiny_llama
from tests.fixtures.ranks.rank_process import Ranks
from tests.fixtures.runs import build_arguments, read_metrics
from tests.fixtures.tokenizers import build_tokenizer
from tests.fixtures.tolerances import CLOSED_FORM_FLOAT64, EVEN_WEIGHTS, LAYOUT_FP32
from trainer.cli.main import main
from trainer.config.groups import DataArguments
from trainer.data.loader import get_data_loader
from trainer.data.mixture import temperature_weights
from trainer.data.order import EpochSampler, epoch_order
from trainer.data.prepare import load_data
from trainer.data.store import TokenStore
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer


def build_mixture(folder: Path) -> tuple[TokenStore, Counter[tuple[int, ...]]]:
    """Three sources in three formats, used twice, once and half a time; and what an oracle says of an epoch."""
    rows = [
        [{"input_ids": [k, n, *range(2 + (n * 7 + k) % 5)]} for n in range(size)] for k, size in enumerate((5, 9, 8))
    ]
    write_jsonl(folder / "0.jsonl", rows[0])
    write_jsonl(folder / "1.jsonl", rows[1])
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "2.jsonl", rows[2]).read_bytes()))
    entries = [
        {"path": str(folder / "0.jsonl"), "repeat": 2},
        {"path": str(folder / "1.jsonl")},
        {"path": str(folder / "2.jsonl.gz"), "repeat": 0.5, "name": "half"},
    ]
    store, _, _ = load_data(DataArguments(data_mixture=entries, data_cache_dir=str(folder / "cache")), None, 3)
    expected: Counter[tuple[int, ...]] = Counter()
    for row in rows[0] + rows[0] + rows[1]:
        expected[tuple(row["input_ids"])] += 1
    return store, expected


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStore, Counter[tuple[int, ...]]]:
    return build_mixture(tmp_path_factory.mktemp("mixture"))


def samples_of(batches: list[list[Any]]) -> list[tuple[int, ...]]:
    """The samples of one rank's micro-batches, placeholders left out."""
    found = []
    for batch in batches:
        for pack in batch:
            if pack["num_tokens"]:
                borders = pack["cu_seq_lens"].tolist()
                ids = pack["input_ids"][0].tolist()
                found += [tuple(ids[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    return found


@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 9), budget=st.integers(8, 40), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_an_epoch_holds_what_the_oracle_says(
    mixture: tuple[TokenStore, Counter[tuple[int, ...]]], world_size: int, batch_size: int, budget: int, epoch: int
) -> None:
    store, expected = mixture
    found: Counter[tuple[int, ...]] = Counter()
    by_source = np.zeros(3)
    for rank in range(world_size):
        sampler = EpochSampler(len(store), 5)
        sampler.set_epoch(epoch)
        loader = get_data_loader(
            store=store,
            batch_size=batch_size,
            max_tokens_per_rank=budget,
            rank=rank,
            world_size=world_size,
            sampler=sampler,
        )
        batches = list(loader)
        found.update(samples_of(batches))
        for batch in batches:
            for pack in batch:
                ids, borders = pack["input_ids"][0].tolist(), pack["cu_seq_lens"].tolist()
                if pack["num_tokens"]:
                    assert pack["source_ids"].tolist() == [ids[begin] for begin in borders[:-1]]
            if rank == 0:
                by_source += batch[0]["batch_source_loss_tokens"]
                assert sum(batch[0]["batch_source_loss_tokens"]) == batch[0]["batch_num_loss_counted_tokens"]
    half = {sample: count for sample, count in found.items() if sample[0] == 2}
    assert {sample: count for sample, count in found.items() if sample[0] != 2} == dict(expected)
    assert (len(half), set(half.values())) == (4, {1})
    assert by_source.tolist() == [int(store.num_loss_tokens[store.sources == k].sum()) for k in range(3)]


def test_a_run_resumed_at_any_step_goes_on_with_the_rest(mixture: tuple[TokenStore, Counter[tuple[int, ...]]]) -> None:
    store, _ = mixture

    def batches_from(start: int, world_size: int) -> list[list[tuple[int, ...]]]:
        ranks = []
        for rank in range(world_size):
            sampler = EpochSampler(len(store), 5)
            sampler.set_epoch(1, start)
            loader = get_data_loader(
                store=store, batch_size=4, max_tokens_per_rank=20, rank=rank, world_size=world_size, sampler=sampler
            )
            ranks.append([samples_of([batch]) for batch in loader])
        return [sorted(sum(parts, [])) for parts in zip(*ranks, strict=True)]

    whole = batches_from(0, 1)
    for step in range(len(whole)):
        assert batches_from(4 * step, 1) == whole[step:]
        assert batches_from(4 * step, 3) == whole[step:]  # elastic: on other ranks


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_by_source_are_those_of_the_samples_alone(ranks: Ranks, tmp_path: Path, smoothing: float) -> None:
    store, _ = build_mixture(tmp_path)
    args = build_arguments(
        ranks.tmp_path / "run",
        max_steps=3,
        batch_size=7,
        max_tokens_per_rank=16,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=3,
    )
    args.label_smoothing_factor = smoothing
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=store, eval_dataset=store)
    trainer.train()
    ranks.barrier()
    model = tiny_llama()
    expected: dict[str, list[float]] = {}  # of a model that stands still, each sample alone
    whole: dict[str, list[float]] = {}
    order = epoch_order(len(store), args.order_seed, 0)
    for place, i in enumerate(order.tolist()):
        ids = torch.from_numpy(store.sample(i).input_ids.astype(np.int64))
        logits = model(ids[None]).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(
            logits, ids[1:], reduction="none", label_smoothing=smoothing
        ).tolist()
        name = f"loss/{store.source_names[store.sources[i]]}"
        whole.setdefault(name, []).extend(losses)
        if place < 7:
            expected.setdefault(name, []).extend(losses)
    step = read_metrics(ranks.tmp_path / "run")[0]
    found = {name: value for name, value in step.items() if name.startswith("loss/")}
    assert found == pytest.approx({name: np.mean(losses) for name, losses in expected.items()}, rel=LAYOUT_FP32)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    found = {name.removeprefix("eval_"): value for name, value in evaluated.items() if name.startswith("eval_loss/")}
    assert found == pytest.approx({name: np.mean(losses) for name, losses in whole.items()}, rel=LAYOUT_FP32)
    counts = {name: len(losses) for name, losses in expected.items()}
    mean = sum(step[name] * count for name, count in counts.items()) / sum(counts.values())
    assert step["loss"] == pytest.approx(mean, rel=LAYOUT_FP32)  # the parts make the whole


def test_temperature_evens_weights_out() -> None:
    assert temperature_weights([100, 300], 1) == pytest.approx([0.25, 0.75], rel=CLOSED_FORM_FLOAT64)
    assert temperature_weights([100, 400], 2) == pytest.approx([1 / 3, 2 / 3], rel=CLOSED_FORM_FLOAT64)
    assert temperature_weights([1, 10**6], 10**6) == pytest.approx([0.5, 0.5], abs=EVEN_WEIGHTS)
    with pytest.raises(UsageError, match="must be a number above 0"):
        temperature_weights([1], 0)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Options that name two sources and a tokenizer."""
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", random_chats(n)) for name, n in (("one", 12), ("two", 4))]
    write_jsonl(tmp_path / "two.jsonl", [chat("needle", "b" * 300), *random_chats(4, seed=2)])
    more = ["--tokenizer-name-or-path", str(tmp_path / "tokenizer"), "--data-cache-dir", str(tmp_path / "cache")]
    return ["--data-path", *map(str, paths), *more]


def test_plan_shows_sources_and_weights(words: list[str], capfd: Any) -> None:
    assert main(["plan", *words, "--batch-size", "4", "--temperature", "2"]) == 0
    text = capfd.readouterr().out
    assert "sources, in an epoch" in text
    assert "weights at temperature 2: one: 0.6077, two: 0.3923" in text


def test_preview_chooses_by_text_source_and_length(words: list[str], capfd: Any) -> None:
    assert main(["preview", *words, "--grep", "needle", "--num-samples", "9"]) == 0
    assert capfd.readouterr().out.count("\nsample ") == 1
    assert main(["preview", *words, "--source", "two", "--longest", "--num-samples", "1"]) == 0
    assert "two.jsonl:1: " in capfd.readouterr().out
    assert main(["preview", *words, "--source", "three"]) == 2
    assert "the sources are one, two" in capfd.readouterr().err


def test_preview_shows_broken_rows(words: list[str], tmp_path: Path, capfd: Any) -> None:
    write_jsonl(tmp_path / "two.jsonl", [chat("a", "b"), "{broken", chat("c", "d"), {"messages": 5}])
    assert main(["preview", *words, "--broken"]) == 1
    text = capfd.readouterr().out
    assert "two.jsonl:2: not JSON" in text
    assert "\n{broken\n" in text
    assert "2 rows cannot be used, 2 shown" in text


def test_the_report_of_data_is_one_page_that_marks_what_is_trained(
    words: list[str], tmp_path: Path, capfd: Any
) -> None:
    write_jsonl(tmp_path / "two.jsonl", [chat("<b>question</b>", "<script>answer</script>")])
    assert main(["prepare", *words, "--report", str(tmp_path / "data.html")]) == 0
    page = (tmp_path / "data.html").read_text(encoding="utf-8")
    assert "<mark>&lt;script&gt;answer&lt;/script&gt;" in page
    assert "<script>" not in page
    assert "http" not in page
    for heading in ("sources", "counts", "tokens of a sample", "trained share", "packing"):
        assert f"<h2>{heading}" in page
