"""What `plan --memory` says is what a run allocates: bytes counted by torch's profiler on a CPU."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, TrainerCallback

from tests.fixtures.models import build_model
from tests.fixtures.oracles import count_loss_tokens
from tests.fixtures.runs import build_trainer, random_token_samples
from tests.fixtures.tolerances import MEMORY_ESTIMATE, MEMORY_STEP_COUNTERS
from trainer.cli.memory import foretell_memory, parse_bytes
from trainer.config.arguments import TrainingArguments
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.build import prepare_model
from trainer.model.lora import add_lora
from trainer.model.osft.layers import apply_osft
from trainer.optim.build import build_optimizer
from trainer.optim.gradients import clip, global_norm
from trainer.training.memory import MOST_TOKENS, ROUNDING, Load, estimate_memory, largest_budget, micro_batch_of
from trainer.training.packed_task import pack_loss


def measured_bytes(args, config, load, mesh=None):
    """Return (peak of a later step, bytes kept by its forward pass) of real tensors, as the profiler counts them."""
    micro_batch = micro_batch_of(load)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model = model_of(config)
        if args.lora_rank is not None:
            model = add_lora(model, args, seed=0)
        adapt = partial(apply_osft, args=args) if args.osft else None
        prepared = prepare_model(model, args, mesh, is_packed=True, adapt=adapt)
        optimizer = build_optimizer(model, args)
        for step in range(2):
            with record_function(f"step {step}"), prepared.in_use():
                with record_function(f"forward {step}"):
                    loss = pack_loss(prepared, micro_batch, 0.0)
                loss.backward()
                clip(model.parameters(), global_norm(model.parameters(), optimizer), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    events = profiler.profiler.kineto_results.events()
    spans = {event.name(): event for event in events if event.name().startswith(("step", "forward"))}
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = kept = 0
    for time, change in changes:
        held += change
        if time >= spans["step 1"].start_ns():
            peak = max(peak, held)
        if spans["forward 1"].start_ns() <= time <= spans["forward 1"].start_ns() + spans["forward 1"].duration_ns():
            kept += change
    return peak, kept


def model_of(config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def small(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, **heads, **changes})


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    hidden=st.sampled_from([64, 96]),
    layers=st.integers(1, 3),
    vocabulary=st.sampled_from([300, 4096]),
    tokens=st.integers(200, 600),
    longest=st.integers(64, 600),
    is_tied=st.booleans(),
    options=st.sampled_from(
        [
            {},
            {"bf16": True},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_keeps": "products"},
            {"optim": "sgd"},
            {"optim": "adafactor"},
            {"osft": True, "osft_unfreeze_rank_ratio": 0.5},
            {"freeze_patterns": ["embed_tokens"]},
            {"lora_rank": 8, "gradient_checkpointing": True},
        ]
    ),
)
@example(64, 2, 512, 400, 100, False, {})
@example(64, 2, 512, 400, 100, False, {"lora_rank": 8})
def test_estimated_bytes_are_those_of_a_real_step(
    hidden, layers, vocabulary, tokens, longest, is_tied, options
) -> None:
    config = small(hidden_size=hidden, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=is_tied)
    args, load = TrainingArguments(**options), Load(tokens, longest, tokens // 2, accumulates=False)
    estimate = estimate_memory(args, config, load, is_sharded=False, on_gpu=False)
    peak, kept = measured_bytes(args, config, load)
    assert estimate.peak == pytest.approx(peak, rel=MEMORY_ESTIMATE)
    assert estimate.kept == pytest.approx(kept, rel=MEMORY_ESTIMATE)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_in_float32_take_what_is_foretold(kind) -> None:
    config, args, load = (
        build_model(kind).config,
        TrainingArguments(use_cpu=True),
        Load(400, 100, 200, accumulates=False),
    )
    estimate = estimate_memory(args, config, load, is_sharded=False, on_gpu=False)
    peak, kept = measured_bytes(args, config, load)
    assert estimate.peak == pytest.approx(peak, rel=MEMORY_ESTIMATE)
    assert estimate.kept == pytest.approx(kept, rel=MEMORY_ESTIMATE)


def measured_on_rank(args, config, load):
    group = Group.join(args)
    return measured_bytes(args, config, load, group.mesh)[0]


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=str)
def test_estimated_peak_of_a_shard_is_that_of_two_ranks(launch, options) -> None:
    args, config = TrainingArguments(use_cpu=True, **options), small(num_hidden_layers=3)
    load = Load(500, 120, 300, accumulates=False)
    estimate = estimate_memory(args, config, load, is_sharded=True, on_gpu=False)
    peaks = launch(2, measured_on_rank, args, config, load, backend="gloo").values
    assert peaks == [pytest.approx(estimate.peak, rel=MEMORY_ESTIMATE)] * 2


def test_other_numbers_of_ranks_change_shards_alone() -> None:
    args, config, load = TrainingArguments(), small(), Load(300, 100, 200)
    two = estimate_memory(args, config, load, is_sharded=True, on_gpu=True)
    many = two.on_ranks(1024)
    assert (many.activations, many.loss) == (two.activations, two.loss)
    assert many.weights < two.weights / 10
    assert two.peak / 10 < many.peak < two.peak
    replicas = two.on_ranks(1024, 2)
    assert (replicas.weights, replicas.optimizer_state, replicas.peak) == (two.weights, two.optimizer_state, two.peak)
    assert two.gradients == two.weights
    assert two.optimizer_state == pytest.approx(2 * two.weights, rel=MEMORY_STEP_COUNTERS)


def test_accumulation_adds_the_gradients_to_the_peak() -> None:
    args, config, load = TrainingArguments(), small(), Load(400, 100, 300)
    accumulating, alone = (
        estimate_memory(args, config, replace(load, accumulates=is_on), is_sharded=False, on_gpu=False)
        for is_on in (True, False)
    )
    assert accumulating.peak == alone.peak + alone.gradients


@given(fixed=st.integers(0, 10**6), slope=st.integers(1, 50), bend=st.integers(0, 3), limit=st.integers(0, 10**7))
def test_the_largest_budget_fits_and_the_next_does_not(fixed, slope, bend, limit) -> None:
    def estimate(tokens):
        return fixed + slope * tokens + bend * tokens**2 // 1000

    budget = largest_budget(estimate, limit, 8192)
    assert budget is None or budget % ROUNDING == 0
    assert estimate(ROUNDING) > limit if budget is None else estimate(budget) <= limit
    assert budget is None or budget >= MOST_TOKENS or estimate(budget + ROUNDING) > limit


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("4096", 4096), ("2tb", 2e12)]
)
def test_sizes_are_read_with_their_units(text, size) -> None:
    assert parse_bytes("memory_limit", text) == size


@pytest.mark.parametrize("text", ["80GX", "", "-1GB", "0", "GB"])
def test_what_is_no_size_is_refused(text) -> None:
    with pytest.raises(UsageError, match="memory_limit = .* give a size such as 80GB"):
        parse_bytes("memory_limit", text)


def test_a_run_warns_before_it_starts_where_memory_is_too_small(tmp_path, capsys) -> None:
    small().save_pretrained(tmp_path)
    args = TrainingArguments(model_config=str(tmp_path), max_tokens_per_rank=512, use_cpu=True)
    foretell_memory(args, 1, 10 * 2**20)
    assert "more than there is" in capsys.readouterr().out
    foretell_memory(args, 1, 2**40)
    assert "roughly" in capsys.readouterr().out


def test_a_run_holds_what_was_foretold_and_no_more_with_every_step(tmp_path: Path) -> None:
    """Gradients, activations and micro-batches of a step are gone with it; the peak is that of the estimate."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    held_before: list[int] = []

    class Profiled(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 1:  # the optimizer has its state
                states = [part for parts in trainer.optimizer.state.values() for part in parts.values()]
                tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *states]
                held_before.append(sum(tensor.nbytes for tensor in tensors))
                profiler.start()
            if state.global_step:
                with record_function(f"before step {state.global_step + 1}"):
                    pass
            if state.global_step == 3:
                profiler.stop()

    config, samples = small(num_hidden_layers=1), random_token_samples([50] * 32)
    options = {"batch_size": 8, "max_tokens_per_rank": 400, "callbacks": [Profiled()]}
    trainer = build_trainer(tmp_path, samples, model_of(config), **options)
    trainer.train()
    events = profiler.profiler.kineto_results.events()
    starts = sorted(event.start_ns() for event in events if event.name().startswith("before step"))
    assert len(starts) == 3
    num_loss_tokens = count_loss_tokens(samples) // 4
    load = Load(400, 50, num_loss_tokens, accumulates=False)
    estimate = estimate_memory(trainer.args, config, load, is_sharded=False, on_gpu=False)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held_by_state = estimate.weights + estimate.optimizer_state
    message = "L7 accounting: between steps weights and optimizer state are held, and nothing else"
    assert held_before[0] == pytest.approx(held_by_state, rel=MEMORY_STEP_COUNTERS), message
    for step in (2, 3):
        held = peak = 0
        for time, change in changes:
            if starts[step - 2] <= time < starts[step - 1]:
                held += change
                peak = max(peak, held)
        assert held == 0, f"L7 accounting: step {step} left {held} bytes behind"
        assert held_before[0] + peak == pytest.approx(estimate.peak, rel=MEMORY_ESTIMATE), (
            f"L7 accounting: the peak of step {step}"
        )
