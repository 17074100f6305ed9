"""L1: a sample's logits and gradient do not depend on what it is packed with."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures import tolerances
from tests.fixtures.models import (
    ATTENTION_ONLY,
    DENSE,
    MIXTURES,
    build_model,
    build_pack,
    packed_model,
    random_samples,
    tiny_llama,
)
from tests.fixtures.oracles import largest_difference
from tests.fixtures.runs import gradients_of
from trainer.errors import IsolationError, ModelError
from trainer.model.attention import packed_forward, packed_inputs
from trainer.model.isolation import check_positions
from trainer.model.loss import token_loss_sum
from trainer.model.prepared import Prepared

# Even and above 2: see tolerances.ISOLATION_FP32.
LENGTHS = (12, 4, 22, 8)


shared_model = cache(packed_model)  # for tests that only read


def pack_of(samples):
    pack = build_pack([len(sample) for sample in samples])
    return {**pack, "input_ids": torch.cat(samples)[None]}


@torch.no_grad()
def packed_logits(prepared, samples):
    with prepared.in_use(), packed_forward():
        logits = prepared.model(**packed_inputs(prepared.model, pack_of(samples))).logits[0]
    return logits.split([len(sample) for sample in samples])


@torch.no_grad()
def lone_logits(prepared, sample):
    with prepared.in_use():
        return prepared.model(input_ids=sample[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", DENSE)
def test_packed_logits_are_bit_equal_to_the_sample_alone(name):
    model, samples = shared_model(name), random_samples(LENGTHS)
    for sample, logits in zip(samples, packed_logits(model, samples), strict=True):
        assert torch.equal(logits, lone_logits(model, sample))


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_logits_of_mixtures_are_those_of_the_sample_alone_up_to_rounding(name):
    model, samples = shared_model(name), random_samples(LENGTHS)  # the rows of an expert differ in number
    for sample, logits in zip(samples, packed_logits(model, samples), strict=True):
        torch.testing.assert_close(logits, lone_logits(model, sample), rtol=0, atol=tolerances.ISOLATION_FP32)


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_packed_logits_equal_transformers_own_attention(name):
    model, own = shared_model(name), Prepared.as_it_is(build_model(name, implementation="eager"))
    samples = random_samples((13, 1, 22, 2))
    for sample, logits in zip(samples, packed_logits(model, samples), strict=True):
        torch.testing.assert_close(logits, lone_logits(own, sample), rtol=0, atol=tolerances.ISOLATION_FP32)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_neighbours_and_order_do_not_matter(lengths, order):
    model, samples = shared_model("llama"), random_samples(lengths)
    alone = [packed_logits(model, [sample])[0] for sample in samples]
    places = list(range(len(samples)))
    order.shuffle(places)
    for place, logits in zip(places, packed_logits(model, [samples[p] for p in places]), strict=True):
        torch.testing.assert_close(logits, alone[place], rtol=0, atol=tolerances.ISOLATION_FP32)


@pytest.mark.parametrize("name", DENSE)
def test_a_neighbours_tokens_change_no_bit(name):
    model = shared_model(name)
    first, second = random_samples((7, 11))
    (other,) = random_samples((7,), seed=5)
    assert torch.equal(packed_logits(model, [first, second])[1], packed_logits(model, [other, second])[1])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "llama4"])
def test_gradients_add_up_over_samples(name):
    whole, parts = packed_model(name, output_router_logits=False), packed_model(name, output_router_logits=False)
    pack = build_pack(LENGTHS)
    token_loss_sum(whole, pack).backward()
    for sample, labels in zip(pack["input_ids"][0].split(LENGTHS), pack["labels"][0].split(LENGTHS), strict=True):
        count = int((labels != -100).sum())
        one = {**pack_of([sample]), "labels": labels[None], "num_loss_counted_tokens": count}
        token_loss_sum(parts, one).backward()
    assert largest_difference(gradients_of(whole.model), gradients_of(parts.model)) < tolerances.ISOLATION_GRADIENT_FP32


def test_an_attention_mask_and_a_cache_do_not_open_the_borders():
    prepared, samples = shared_model("llama"), random_samples((8, 6))
    with torch.no_grad(), prepared.in_use():
        inputs = packed_inputs(prepared.model, pack_of(samples))
        careless = {**inputs, "use_cache": True, "attention_mask": torch.ones_like(inputs["input_ids"])}
        logits = prepared.model(**careless).logits
    assert torch.equal(logits[0], torch.cat(packed_logits(prepared, samples)))


def test_positions_that_follow_the_longest_sample_of_a_pack_are_refused():
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model.config.rope_parameters["original_max_position_embeddings"] = 64
    check_positions(model, longest=64)
    with pytest.raises(IsolationError, match="passes 64 tokens; the longest here has 65"):
        check_positions(model, longest=65)


def test_samples_longer_than_the_models_positions_are_refused():
    model = shared_model("gpt2").model
    limit = model.config.max_position_embeddings
    check_positions(model, limit)
    with pytest.raises(ModelError, match=f"has positions for {limit}"):
        check_positions(model, limit + 1)
