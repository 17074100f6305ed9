"""The loss of a pack against transformers' own loss, against whole logits in float64, and within its memory."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fixtures import tolerances
from tests.fixtures.models import (
    ATTENTION_ONLY,
    VOCABULARY,
    build_model,
    build_pack,
    packed_model,
    prepared_for_packs,
    tiny_llama,
)
from tests.fixtures.oracles import largest_difference, relative_difference
from tests.fixtures.runs import gradients_of
from trainer.errors import ModelError
from trainer.model import cross_entropy
from trainer.model.attention import packed_inputs
from trainer.model.cross_entropy import HeadOutput, choose_rows_per_piece, linear_cross_entropy_sum
from trainer.model.loss import token_loss_sum, trained_positions

LENGTHS = (13, 5, 1, 22, 9)
SUMMED = torch.tensor(1)  # transformers divides a sum by this many items

# What a model does to the output of its head; all others do nothing.
HEAD_OUTPUTS = {"gemma2": HeadOutput(1.0, 4.0), "granite": HeadOutput(1 / 3), "cohere": HeadOutput(0.0625)}


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_loss_head_and_gradients_are_transformers_own(name):
    ours, theirs, pack = packed_model(name), build_model(name), build_pack(LENGTHS)
    loss = token_loss_sum(ours, pack)
    assert_measured(ours.head, HEAD_OUTPUTS.get(name, HeadOutput()))
    with prepared_for_packs(theirs).in_use():
        output = theirs(**packed_inputs(theirs, pack), labels=pack["labels"], num_items_in_batch=SUMMED)
    expected, router_loss = output.loss, getattr(output, "aux_loss", None)
    if router_loss is not None:  # transformers adds it once, to what it takes for a mean
        coefficient = theirs.config.router_aux_loss_coef
        expected = expected + coefficient * router_loss * (pack["num_loss_counted_tokens"] - 1)
    torch.testing.assert_close(loss, expected, rtol=tolerances.LOSS_FP32, atol=0)
    loss.backward()
    expected.backward()
    assert largest_difference(gradients_of(ours.model), gradients_of(theirs)) < tolerances.LOSS_GRADIENT_FP32


def assert_measured(found, expected):
    assert found is not None
    assert found.softcap == expected.softcap
    assert found.scale == pytest.approx(expected.scale, rel=torch.finfo(torch.float32).eps)


class Scrambled(torch.nn.Linear):
    """A head that is no plain linear layer."""

    def forward(self, hidden):
        return super().forward(hidden).sin()


@pytest.mark.parametrize("change", ["another class of head", "logits changed by the vocabulary"])
def test_a_head_that_cannot_be_replaced_computes_its_own_logits(change, monkeypatch):
    model, pack = tiny_llama(), build_pack(LENGTHS)
    if change == "another class of head":
        model.lm_head.__class__ = Scrambled
    else:
        plain = model.forward

        def shifted(**inputs):
            output = plain(**inputs)
            output.logits = output.logits + torch.arange(VOCABULARY)
            return output

        monkeypatch.setattr(model, "forward", shifted)
    prepared = prepared_for_packs(model)
    assert prepared.head is None
    with prepared.in_use():
        logits = model.forward(**packed_inputs(model, pack)).logits[0]
    expected = F.cross_entropy(logits[:-1], pack["labels"][0, 1:], reduction="sum", ignore_index=-100)
    torch.testing.assert_close(token_loss_sum(prepared, pack), expected, rtol=tolerances.LOSS_FP32, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_label_smoothing_is_torchs(label_smoothing):
    prepared, pack = packed_model("gemma2"), build_pack(LENGTHS)
    with prepared.in_use():
        logits = prepared.model(**packed_inputs(prepared.model, pack)).logits[0]
    positions, targets = trained_positions(pack)
    expected = F.cross_entropy(logits[positions], targets, reduction="sum", label_smoothing=label_smoothing)
    loss = token_loss_sum(prepared, pack, label_smoothing)
    torch.testing.assert_close(loss, expected, rtol=tolerances.LOSS_FP32, atol=0)


def test_a_pack_without_trained_tokens_gives_zero_everywhere():
    for name in ("llama", "gemma2", "mixtral", "gpt_oss"):
        prepared = packed_model(name)
        pack = {**build_pack([4], trained_share=0.0), "num_tokens": 0, "num_samples": 0}
        pack |= {"batch_num_tokens": 9, "batch_num_loss_counted_tokens": 5, "batch_num_samples": 1}
        loss = token_loss_sum(prepared, pack)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in prepared.model.parameters())


def test_a_router_loss_weighs_what_its_tokens_weigh_in_the_global_batch():
    prepared = packed_model("mixtral")
    model = prepared.model
    one = build_pack([9], batch={"num_tokens": 36, "num_loss_counted_tokens": 20, "num_samples": 4})
    without = {**one, "num_tokens": 0}
    with torch.no_grad(), prepared.in_use():
        difference = token_loss_sum(prepared, one) - token_loss_sum(prepared, without)
        router_loss = model(**packed_inputs(model, one)).aux_loss
    expected = model.config.router_aux_loss_coef * router_loss * 9 / 36 * 20
    torch.testing.assert_close(difference, expected, rtol=tolerances.LOSS_FP32, atol=tolerances.LOSS_FP32)


def test_a_router_loss_that_is_asked_for_and_not_computed_is_refused():
    """As granitemoe of transformers 5.17, whose router logits are recorded by nobody."""
    prepared = packed_model("mixtral", output_router_logits=True)
    prepared.model.register_forward_hook(lambda model, inputs, output: setattr(output, "aux_loss", 0))
    with pytest.raises(ModelError, match=r"'mixtral' asks for a router loss .* computes none"):
        token_loss_sum(prepared, build_pack([4, 5]))


def test_a_router_loss_of_unknown_weight_is_refused(monkeypatch):
    prepared = packed_model("mixtral", output_router_logits=True)
    model = prepared.model
    del model.config.__dict__["router_aux_loss_coef"]
    monkeypatch.delattr(type(model.config), "router_aux_loss_coef")
    with pytest.raises(ModelError, match="'mixtral' returns a router loss, but its config has no router_aux_loss_coef"):
        token_loss_sum(prepared, build_pack([5]))


def test_bfloat16_compute_keeps_float32_gradients_near_the_exact_ones():
    exact, rough = packed_model("llama"), prepared_for_packs(tiny_llama(), bf16=True)
    losses = [token_loss_sum(prepared, build_pack(LENGTHS)) for prepared in (exact, rough)]
    for loss in losses:
        loss.backward()
    assert losses[1].dtype == torch.float32
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerances.LOSS_BF16, atol=0)
    assert relative_difference(gradients_of(rough.model), gradients_of(exact.model)) < tolerances.GRADIENT_BF16


@settings(max_examples=20, deadline=None)
@given(
    num_positions=st.integers(0, 9),
    rows=st.integers(1, 4),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    has_bias=st.booleans(),
    frozen=st.sampled_from(["", "hidden", "weight"]),
)
def test_pieces_equal_whole_logits_in_float64(num_positions, rows, scale, softcap, label_smoothing, has_bias, frozen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, 6, generator=generator, dtype=torch.float64, requires_grad=frozen != "hidden")
    head = torch.nn.Linear(6, 11, bias=has_bias, dtype=torch.float64)
    head.weight.requires_grad_(frozen != "weight")
    targets = torch.randint(11, (num_positions,), generator=generator)
    inputs = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
    logits = head(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    whole = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    output = HeadOutput(scale, softcap)
    pieces = linear_cross_entropy_sum(hidden, head, targets, output, label_smoothing, rows_per_piece=rows)
    torch.testing.assert_close(pieces, whole, rtol=tolerances.LOSS_FLOAT64, atol=tolerances.LOSS_FLOAT64)
    ours, theirs = (torch.autograd.grad(loss * 3, inputs, allow_unused=True) for loss in (pieces, whole))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerances.LOSS_FLOAT64, atol=tolerances.LOSS_FLOAT64)


def test_pieces_hold_enough_rows_and_no_more_than_a_few_hundred_megabytes_of_logits():
    for device in ("cpu", "cuda"):
        for vocab_size in (100, 32_000, 128_256, 262_144):
            rows = choose_rows_per_piece(device, vocab_size)
            assert rows >= 128
            assert rows * vocab_size * 4 <= 2**29


def test_backward_twice_is_refused():
    head, hidden = torch.nn.Linear(4, 8), torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, head, torch.tensor([1, 2, 3]), HeadOutput())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_no_tensor_grows_with_positions_times_vocabulary(monkeypatch):
    monkeypatch.setitem(cross_entropy.LOGITS_PER_PIECE, "cpu", 4 * 512)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS_PER_PIECE", 1)
    prepared, pack = packed_model("llama", vocab_size=512), build_pack([60], trained_share=1.0)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as mode, saved_tensors_hooks(keep, lambda tensor: tensor):
        token_loss_sum(prepared, pack).backward()
    assert 60 * 512 > mode.largest == 32 * 512  # the embedding, and its gradient
    assert max(kept) < 60 * 512


def test_evaluation_computes_no_gradients():
    prepared = packed_model("llama")
    with torch.no_grad():
        loss = token_loss_sum(prepared, build_pack(LENGTHS))
    assert not loss.requires_grad
    assert gradients_of(prepared.model) == {}
