"""Packed attention against attention written out, and the probe that refuses what leaks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fixtures import tolerances
from tests.fixtures.models import (
    ATTENTION_ONLY,
    MIXTURES,
    RECURRENT,
    build_model,
    build_pack,
    packed_model,
    prepared_for_packs,
    tiny_llama,
)
from trainer.config.groups import ModelArguments
from trainer.errors import IsolationError, MissingPackageError, ModelError
from trainer.model.attention import PACKED_SDPA, choose_attention, packed_inputs, packed_sdpa
from trainer.model.build import prepare_model
from trainer.model.isolation import check_isolation


class Layer(torch.nn.Module):
    """An attention layer as the attention function sees it."""

    is_causal = True


def oracle(query, key, value, lengths, window=None, softcap=None, sinks=None, scale=None):
    """Attention of (H,T,E) token by token, head by head, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    output = torch.zeros(query.shape[0], query.shape[1], value.shape[2], dtype=torch.float64)
    starts = [start for start, length in zip(_starts(lengths), lengths, strict=True) for _ in range(length)]
    for head in range(query.shape[0]):
        group = head * key.shape[0] // query.shape[0]
        for t, start in enumerate(starts):
            first = start if window is None else max(start, t - window + 1)
            scores = key[group, first : t + 1] @ query[head, t] * (scale or query.shape[2] ** -0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            rest = 0 if sinks is None else sinks[head].double().exp()
            output[head, t] = (weights / (weights.sum() + rest)) @ value[group, first : t + 1]
    return output


def _starts(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"softcap": 1.5},
        {"sinks": True},
        {"window": 4, "softcap": 2.0, "sinks": True},
        {"scale": 0.3},
    ],
    ids=str,
)
def test_packed_attention_is_what_the_formula_says(options):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 9, 3]
    query, key, value = (torch.randn(1, heads, sum(lengths), 8, generator=generator) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator) if options.get("sinks") else None
    borders = torch.tensor([*_starts(lengths), sum(lengths)], dtype=torch.int32)
    output, _ = packed_sdpa(
        Layer(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=borders,
        sliding_window=options.get("window"),
        softcap=options.get("softcap"),
        s_aux=sinks,
        scaling=options.get("scale"),
    )
    expected = oracle(query[0], key[0], value[0], lengths, **{**options, "sinks": sinks})
    torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, rtol=0, atol=tolerances.ISOLATION_FP32)


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_cpu_rounds_once_what_it_is_given_in_bfloat16(is_autocast, masked):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 9, 8, generator=generator).bfloat16() for _ in range(3)]
    mask = torch.zeros(9, 9, dtype=torch.bfloat16).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    options = {"attention_mask": mask if masked else None, "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        output, _ = packed_sdpa(Layer(), *inputs, **options)
    exact, _ = packed_sdpa(Layer(), *(tensor.float() for tensor in inputs), **options)
    assert torch.equal(output, exact.bfloat16())


def test_a_mask_holds_within_each_sample():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[3, 1] = mask[7, 5] = False
    packed, _ = packed_sdpa(Layer(), query, key, value, mask, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    for rows in (slice(0, 4), slice(4, 9)):
        parts = (tensor[:, :, rows] for tensor in (query, key, value))
        alone, _ = packed_sdpa(Layer(), *parts, mask[rows, rows])
        assert torch.equal(packed[:, rows], alone)


def test_borders_are_read_from_restarting_positions_too():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    by_borders, _ = packed_sdpa(Layer(), query, key, value, None, cu_seq_lens_q=borders)
    by_positions, _ = packed_sdpa(Layer(), query, key, value, None, position_ids=positions)
    assert torch.equal(by_borders, by_positions)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_padded_batches_and_generation_work_as_with_transformers_own_attention(name):
    changes = {"output_router_logits": False} if name in MIXTURES else {}
    model, own = build_model(name, **changes), build_model(name, implementation="eager", **changes)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad(), prepared_for_packs(model).in_use():
        ours, theirs = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (model, own))
        texts = [
            m.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
            for m in (model, own)
        ]
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=tolerances.ISOLATION_FP32)
    assert torch.equal(*texts)


def test_packed_inputs_name_the_sample_of_each_token():
    inputs = packed_inputs(tiny_llama(), build_pack([3, 1, 2]))
    assert inputs["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert (inputs["max_length_q"], inputs["use_cache"]) == (3, False)


class TestChoice:
    def test_the_cpu_uses_one_call_for_each_sample_in_every_part_of_the_model(self):
        model = tiny_llama()
        with prepared_for_packs(model).in_use():
            assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {PACKED_SDPA}
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}

    def test_cuda_uses_the_kernel_where_it_can(self):
        assert choose_attention(tiny_llama(), "auto", "cuda", torch.bfloat16).name == "varlen"

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("llama", torch.float32), ("gemma2", torch.bfloat16), ("gpt_oss", torch.bfloat16), ("llama4", torch.bfloat16)]
        + [("deepseek_v3", torch.bfloat16)],
    )
    def test_cuda_falls_back_where_the_kernel_cannot(self, name, dtype):
        assert choose_attention(build_model(name), "auto", "cuda", dtype).name == PACKED_SDPA

    def test_an_unknown_name_is_refused_with_the_known_ones(self):
        with pytest.raises(ModelError, match="'sdpaa' is unknown; allowed: auto, packed_sdpa"):
            choose_attention(tiny_llama(), "sdpaa")

    def test_the_kernel_asked_for_on_a_cpu_is_refused(self):
        with pytest.raises(ModelError, match="'varlen' cannot run here: it needs CUDA"):
            choose_attention(tiny_llama(), "varlen")

    def test_a_missing_package_is_named(self):
        with pytest.raises(MissingPackageError, match="pip install flash-attn"):
            choose_attention(tiny_llama(), "flash_attention_2")


class TestProbe:
    @pytest.mark.parametrize("name", ATTENTION_ONLY)
    def test_attention_models_pass(self, name):
        prepared = packed_model(name)
        check_isolation(prepared)

    @pytest.mark.parametrize("name", RECURRENT)
    def test_recurrent_models_without_their_kernels_are_refused(self, name):
        with pytest.raises(IsolationError, match=f"model type '{name}' with attn_implementation 'packed_sdpa'"):
            prepare_model(build_model(name), ModelArguments(), is_packed=True)

    @pytest.mark.parametrize(("size", "shift"), [(1e-8, 0.0), (1e-4, 0.0), (1.0, 0.0), (1e4, 0.0), (1e-2, 1e3)])
    def test_a_leak_is_refused_whatever_size_and_mean_logits_have(self, size, shift):
        leaking = build_model("gpt_oss")
        leaking.lm_head.weight.data *= size
        leaking.lm_head.register_forward_hook(lambda module, given, logits: logits + shift)
        model = prepared_for_packs(leaking, attn_implementation="eager")
        with pytest.raises(IsolationError, match="'gpt_oss' with attn_implementation 'eager' leaks"):
            check_isolation(model)

    def test_a_position_that_does_not_restart_is_refused(self, monkeypatch):
        model = build_model("gpt2")
        forward = model.transformer.forward

        def deaf(*args, position_ids=None, **kwargs):
            return forward(*args, **kwargs)

        monkeypatch.setattr(model.transformer, "forward", deaf)
        with pytest.raises(IsolationError, match="with being packed at all"):
            check_isolation(prepared_for_packs(model))

    def test_weights_that_are_not_finite_are_no_leak(self):
        model = tiny_llama()
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        with pytest.raises(ModelError, match="not finite"):
            check_isolation(prepared_for_packs(model))

    def test_the_mode_of_every_part_is_kept(self):
        model = tiny_llama().train()
        prepared = prepared_for_packs(model)
        model.model.layers[0].eval()
        check_isolation(prepared)
        assert model.training
        assert not model.model.layers[0].training


class TestOnCuda:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"attention_dropout": 0.1}, "drops attention weights in training"),
            ({"head_dim": 12}, "head size 12"),
        ],
        ids=str,
    )
    def test_the_reason_for_the_slower_attention_is_given(self, changes, reason):
        attention = choose_attention(tiny_llama(**changes), "auto", "cuda", torch.bfloat16)
        assert attention.name == PACKED_SDPA
        assert reason in attention.reason
        in_float32 = choose_attention(tiny_llama(), "auto", "cuda", torch.float32)
        assert "set bf16" in in_float32.reason

    def test_gpt2_with_its_default_dropout_does_not_lose_it(self):
        model = build_model("gpt2", attn_pdrop=0.1)
        assert choose_attention(model, "auto", "cuda", torch.bfloat16).name == PACKED_SDPA

    def test_layers_of_different_head_sizes_and_layers_that_are_not_causal_are_seen(self, monkeypatch):
        model = tiny_llama()
        layer = model.model.layers[1].self_attn
        monkeypatch.setattr(layer, "head_dim", 512)
        assert "head size 512" in choose_attention(model, "auto", "cuda", torch.bfloat16).reason
        monkeypatch.undo()
        monkeypatch.setattr(layer, "is_causal", False)
        assert "not causal" in choose_attention(model, "auto", "cuda", torch.bfloat16).reason

    @pytest.mark.parametrize("options", [{"dropout": 0.1}, {"is_causal": False}], ids=str)
    def test_the_kernel_refuses_what_it_would_leave_out(self, options):
        from trainer.model.varlen import varlen

        query = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
        borders = torch.tensor([0, 4], dtype=torch.int32)
        with pytest.raises(ModelError, match="which 'varlen' cannot; use 'auto'"):
            varlen(Layer(), query, query, query, None, cu_seq_lens_q=borders, max_length_q=4, **options)

    @pytest.mark.parametrize(
        ("dtype", "size", "has_mask", "is_repeated"),
        [
            (torch.bfloat16, 8, False, False),
            (torch.bfloat16, 8, True, True),
            (torch.bfloat16, 512, False, True),
            (torch.float32, 8, False, True),
        ],
    )
    def test_grouped_keys_are_repeated_where_no_kernel_groups_them(
        self, dtype, size, has_mask, is_repeated, monkeypatch
    ):
        """Fake tensors: no GPU is needed to see with what torch is called."""
        calls = []

        def attend(query, key, value, *, enable_gqa, **_):
            calls.append((key.shape[1], enable_gqa))
            return torch.empty(query.shape)  # on the CPU: what follows needs no GPU

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        with FakeTensorMode():
            query = torch.empty(1, 4, 6, size, dtype=dtype, device="cuda")
            key = torch.empty(1, 2, 6, size, dtype=dtype, device="cuda")
            mask = torch.ones(6, 6, dtype=torch.bool, device="cuda") if has_mask else None
            packed_sdpa(Layer(), query, key, key, mask)
        assert calls == [(4, False) if is_repeated else (2, True)]

    def test_borders_are_read_from_the_device_once_for_all_layers(self):
        class Counted(torch.Tensor):
            num_reads = 0

            def tolist(self):
                Counted.num_reads += 1
                return super().tolist()

        borders = torch.tensor([0, 4, 9], dtype=torch.int32).as_subclass(Counted)
        query = torch.zeros(1, 2, 9, 8)
        for _ in range(3):
            packed_sdpa(Layer(), query, query, query, None, cu_seq_lens_q=borders)
        assert Counted.num_reads == 1

    def test_memory_that_runs_out_at_the_probe_is_no_leak(self, monkeypatch):
        prepared = packed_model("llama")

        def forward(**_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(prepared.model, "forward", forward)
        with pytest.raises(torch.OutOfMemoryError):
            check_isolation(prepared)
