"""How a model comes to be ready: aligned with its tokenizer, loaded or drawn, frozen, sharded, recomputed."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM

from tests.fixtures import tolerances
from tests.fixtures.liger import stand_in_for_liger
from tests.fixtures.models import (
    ATTENTION_ONLY,
    VOCABULARY,
    build_config,
    build_model,
    build_pack,
    save_model,
    tiny_llama,
)
from tests.fixtures.oracles import largest_difference
from tests.fixtures.runs import gradients_of
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import ModelArguments
from trainer.errors import MissingPackageError, ModelError, UsageError
from trainer.model.borrowing import Borrowing
from trainer.model.build import (
    build_on_meta,
    find_files,
    find_model,
    load_model,
    prepare_model,
    read_config,
)
from trainer.model.freezing import freeze
from trainer.model.fsdp import decoder_blocks, whole
from trainer.model.liger import fused_settings, liger_settings
from trainer.model.loss import token_loss_sum
from trainer.model.tokenizer import load_tokenizer
from trainer.model.weights import FileWeights

SHARDED = [
    "llama_tied",
    "gpt2",
    "gpt_oss",
    "deepseek_v3",
]  # tied, own key prefix, own kernels and fused experts, buffers


def prepare(directory, tokenizer=None, mesh=None, seed=0, **options):
    return load_model(ModelArguments(model_name_or_path=str(directory), **options), tokenizer, mesh, seed=seed)


def load(directory, tokenizer=None, mesh=None, seed=0, **options):
    return prepare(directory, tokenizer, mesh, seed, **options).model


def draw(directory, tokenizer=None, mesh=None, seed=0, **options):
    return load_model(ModelArguments(model_config=str(directory), **options), tokenizer, mesh, seed=seed).model


def plain_load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def assert_same_weights(ours, theirs):
    one, other = ours.state_dict(), theirs.state_dict()
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(whole(one[name]), whole(other[name]))] == []
    buffers = dict(theirs.named_buffers())
    assert [name for name, buffer in ours.named_buffers() if not torch.equal(buffer, buffers[name])] == []


def rewrite(directory, change):
    """Change the tensors of a saved model."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


class TestLoading:
    @pytest.mark.parametrize("name", ATTENTION_ONLY)
    def test_weights_and_buffers_are_those_of_a_plain_load(self, name, tmp_path):
        save_model(tmp_path, name)
        ours, theirs = load(tmp_path), plain_load(tmp_path)
        assert_same_weights(ours, theirs)
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
        assert all(ours.get_parameter(a) is ours.get_parameter(b) for a, b in ours.all_tied_weights_keys.items())

    def test_a_checkpoint_in_bfloat16_and_in_many_files_is_trained_in_float32(self, tmp_path):
        tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        prepared = prepare(tmp_path)
        assert_same_weights(prepared.model, plain_load(tmp_path))
        assert prepared.stored_dtype == torch.bfloat16  # exports go back to it

    def test_a_missing_tensor_is_named(self, tmp_path):
        save_model(tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(ModelError, match=r"lacks 1 tensors of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight"):
            load(tmp_path)

    def test_an_unknown_tensor_is_named(self, tmp_path):
        save_model(tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(2)}))
        with pytest.raises(ModelError, match=r"has unknown 1 tensors of LlamaForCausalLM: model.layers.2.extra"):
            load(tmp_path)

    def test_a_tensor_of_another_shape_is_named(self, tmp_path):
        save_model(tmp_path)
        rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}))
        with pytest.raises(ModelError, match=r"model.norm.weight has shape \(16,\), the model expects \(32,\)"):
            load(tmp_path)

    def test_tied_weights_that_differ_are_refused(self, tmp_path):
        save_model(tmp_path, "llama_tied")
        rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(VOCABULARY, 32)}))
        with pytest.raises(ModelError, match="differ although config.json ties them; set tie_word_embeddings to false"):
            load(tmp_path)

    def test_tied_weights_may_be_stored_under_either_name(self, tmp_path):
        model = save_model(tmp_path, "llama_tied")
        rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
        assert_same_weights(load(tmp_path), model)

    def test_pickled_weights_are_refused(self, tmp_path):
        model = save_model(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="pytorch_model.bin: pickled weights can run code .* convert them"):
            load(tmp_path)

    def test_a_broken_file_is_named(self, tmp_path):
        save_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(ModelError, match="model.safetensors is not a readable safetensors file"):
            load(tmp_path)

    def test_a_folder_without_a_model_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match="no usable config.json"):
            load(tmp_path)

    def test_a_place_that_is_nowhere_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelError, match="no folder '.*nowhere' here, and the hub does not give it"):
            load(tmp_path / "nowhere")

    def test_a_model_and_a_config_exclude_each_other(self):
        with pytest.raises(UsageError, match="give either model_name_or_path"):
            load_model(ModelArguments(), seed=0)

    def test_code_of_the_model_runs_only_when_asked_for(self, tmp_path):
        save_model(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "own.py").write_text("raise SystemExit('the code ran')")
        with pytest.raises(ModelError, match="trust_remote_code"):
            load(tmp_path)


class TestRandomWeights:
    @pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma3", "mixtral", "gpt_oss"])
    def test_a_seed_gives_the_same_weights_again_and_another_gives_others(self, name, tmp_path):
        build_config(name).save_pretrained(tmp_path)
        first, again, other = draw(tmp_path), draw(tmp_path / "config.json"), draw(tmp_path, seed=1)
        assert_same_weights(first, again)
        matrices = [(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True) if p.std() > 0]
        assert matrices
        assert not any(torch.equal(p, q) for p, q in matrices)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
    def test_weights_are_spread_as_the_models_own_class_spreads_them(self, name, tmp_path):
        config = build_config(name)
        config.save_pretrained(tmp_path)
        own = AutoModelForCausalLM.from_config(config)
        for (parameter, ours), theirs in zip(draw(tmp_path).named_parameters(), own.parameters(), strict=True):
            spread = tolerances.RANDOM_SPREAD * theirs.std() if theirs.numel() > 500 else 1.0
            assert abs(ours.std() - theirs.std()) <= spread, parameter
            if theirs.std() == 0:
                assert torch.equal(ours, theirs), parameter

    def test_a_file_of_any_name_is_the_configuration(self, tmp_path):
        build_config("llama").save_pretrained(tmp_path)
        smaller = json.loads((tmp_path / "config.json").read_bytes()) | {"num_hidden_layers": 1}
        (tmp_path / "smaller.json").write_text(json.dumps(smaller))
        assert draw(tmp_path).config.num_hidden_layers > 1
        assert len(draw(tmp_path / "smaller.json").model.layers) == 1

    def test_drawing_does_not_touch_the_global_random_state(self, tmp_path):
        build_config("llama").save_pretrained(tmp_path)
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        draw(tmp_path)
        assert torch.equal(torch.rand(1), expected)


class TestModelAndTokenizerAlignment:
    @pytest.mark.parametrize("name", ["llama", "llama_tied"])
    def test_a_vocabulary_too_small_grows_to_a_multiple_of_8_with_mean_rows(self, name, tmp_path):
        save_model(tmp_path, name)
        tokenizer = build_tokenizer()
        model, stored = load(tmp_path, tokenizer), plain_load(tmp_path)
        old, new = stored.get_input_embeddings().weight, model.get_input_embeddings().weight
        assert new.shape[0] == model.config.vocab_size == -(-len(tokenizer) // 8) * 8
        assert torch.equal(new[:VOCABULARY], old)
        torch.testing.assert_close(new[VOCABULARY:], old.mean(dim=0).expand_as(new[VOCABULARY:]))
        assert model.get_output_embeddings().weight.shape == new.shape
        assert (model.get_output_embeddings().weight is new) == (name == "llama_tied")

    def test_a_vocabulary_large_enough_stays(self, tmp_path):
        save_model(tmp_path, vocab_size=1003)
        assert load(tmp_path, build_tokenizer()).config.vocab_size == 1003

    def test_special_ids_are_the_tokenizers_and_further_end_ids_stay(self, tmp_path):
        model = save_model(tmp_path)
        model.generation_config.eos_token_id = [6, 7]
        model.generation_config.save_pretrained(tmp_path)
        tokenizer = build_tokenizer()
        aligned = load(tmp_path, tokenizer)
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        assert [getattr(aligned.config, name) for name in names] == [getattr(tokenizer, name) for name in names]
        assert aligned.generation_config.eos_token_id == [tokenizer.eos_token_id, 6, 7]
        assert aligned.generation_config.pad_token_id == tokenizer.pad_token_id

    def test_an_end_token_that_pads_is_trained(self, tmp_path):
        save_model(tmp_path, pad_token_id=2, vocab_size=1000)
        tokenizer = build_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        prepared, pack = prepare(tmp_path, tokenizer), build_pack([6], trained_share=1.0)
        pack["input_ids"][0, 2:4] = torch.tensor([2, tokenizer.eos_token_id])
        token_loss_sum(prepared, pack).backward()
        assert prepared.model.get_input_embeddings().weight.grad[[2, tokenizer.eos_token_id]].any(dim=1).all()

    def test_a_tokenizer_is_loaded_from_the_models_folder(self, tmp_path):
        build_tokenizer().save_pretrained(tmp_path)
        assert load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path))).eos_token == "<|im_end|>"

    def test_a_config_may_be_named_by_its_file(self, tmp_path):
        build_config("llama").save_pretrained(tmp_path)
        assert_same_weights(draw(tmp_path / "config.json", seed=3), draw(tmp_path, seed=3))
        with pytest.raises(ModelError, match="give a folder with a config.json, or the file itself"):
            draw(tmp_path / "config.yaml")

    def test_a_config_has_no_tokenizer(self, tmp_path):
        with pytest.raises(UsageError, match="tokenizer_name_or_path: needed with model_config"):
            load_tokenizer(ModelArguments(model_config=str(tmp_path)))


class TestFreezing:
    def test_patterns_freeze_what_they_match(self):
        model = tiny_llama()
        frozen = freeze(model, [r"embed", r"layers\.0\."])
        assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]
        assert {name.split(".")[1] + name.split(".")[2] for name in frozen} == {"embed_tokensweight", "layers0"}

    def test_a_pattern_that_matches_nothing_names_what_is_like_it(self):
        with pytest.raises(ModelError, match=r"'q_porj' matches no parameter of this model; names like it: .*q_proj"):
            freeze(tiny_llama(), ["q_porj"])

    def test_a_pattern_that_is_none_is_refused(self):
        with pytest.raises(ModelError, match=r"'layers\.\(' is not a regular expression"):
            freeze(tiny_llama(), ["layers.("])

    def test_nothing_left_to_train_is_refused(self):
        with pytest.raises(ModelError, match="freeze all 21 parameters"):
            freeze(tiny_llama(), ["."])


class TestActivationCheckpointing:
    @pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
    def test_gradients_do_not_change(self, name, tmp_path):
        save_model(tmp_path, name)
        kept, recomputed = prepare(tmp_path), prepare(tmp_path, gradient_checkpointing=True)
        calls = count_calls(next(iter(decoder_blocks(recomputed.model).values())))
        for prepared in (kept, recomputed):
            with prepared.in_use():
                token_loss_sum(prepared, build_pack([5, 9])).backward()
        assert len(calls) == 2
        for one, other in zip(kept.model.parameters(), recomputed.model.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


def count_calls(block):
    """Each run of the block's first leaf adds an entry."""
    calls = []
    leaf = next(module for module in block.modules() if not list(module.children()))
    leaf.register_forward_hook(lambda *_: calls.append(1) and None)
    return calls


class TestPrecision:
    def test_bfloat16_computes_in_it_and_keeps_float32_weights(self, tmp_path):
        save_model(tmp_path)
        prepared = prepare(tmp_path, bf16=True)
        model = prepared.model
        with prepared.compute_context():
            assert model(torch.tensor([[3, 4]]), use_cache=False).logits.dtype == torch.bfloat16
        token_loss_sum(prepared, build_pack([5])).backward()
        assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.world_size(2, 3)
class TestShardingWithFSDP2:
    @pytest.fixture
    def saved(self, ranks):
        def save(name, **changes):
            if ranks.is_main:
                save_model(ranks.tmp_path, name, **changes)
            ranks.barrier()
            return ranks.tmp_path

        return save

    @pytest.mark.world_size(2)
    @pytest.mark.parametrize(
        ("name", "options"),
        [(name, {}) for name in SHARDED] + [("llama", {"gradient_checkpointing": True})],
    )
    def test_weights_losses_and_summed_gradients_are_those_of_one_process(self, name, options, ranks, saved):
        self.check_sharded(name, options, ranks, saved)

    @pytest.mark.world_size(3)
    @pytest.mark.parametrize("name", ["llama_tied", "deepseek_v3"])
    def test_ranks_that_do_not_divide_the_dimensions_compute_the_same(self, name, ranks, saved):
        self.check_sharded(name, {}, ranks, saved)

    def check_sharded(self, name, options, ranks, saved):
        directory = saved(name)
        packs = [build_pack([7, 3, 9], seed=rank, batch=BATCH) for rank in range(ranks.world_size)]
        prepared = prepare(directory, mesh=ranks.mesh(), **options)
        sharded = prepared.model
        assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in sharded.parameters())
        assert_same_weights(sharded, plain_load(directory))
        losses, gradients = ranks.once(lambda: self.in_one_process(prepare(directory, **options), packs))
        for _ in range(2):  # micro-batches accumulate
            with prepared.in_use():
                loss = token_loss_sum(prepared, packs[ranks.rank])
                loss.backward()
            assert torch.equal(loss, losses[ranks.rank])
        assert largest_difference(gradients_of(sharded), gradients) < tolerances.LAYOUT_FP32

    def in_one_process(self, prepared, packs):
        for _ in range(2):
            with prepared.in_use():
                losses = [token_loss_sum(prepared, pack) for pack in packs]
                sum(losses).backward()
        return [loss.detach() for loss in losses], gradients_of(prepared.model)

    @pytest.mark.world_size(2)
    def test_bfloat16_reduces_in_float32(self, ranks, saved):
        directory = saved("llama")
        sharded, single = prepare(directory, mesh=ranks.mesh(), bf16=True), prepare(directory)
        packs = [build_pack([7, 3, 9], seed=rank) for rank in range(ranks.world_size)]
        token_loss_sum(sharded, packs[ranks.rank]).backward()
        sum(token_loss_sum(single, pack) for pack in packs).backward()
        models = sharded.model, single.model
        assert {p.grad.dtype for p in sharded.model.parameters()} == {torch.float32}
        ours, theirs = (torch.cat([whole(p.grad).flatten() for p in model.parameters()]) for model in models)
        assert 0 < (ours - theirs).norm() / theirs.norm() < tolerances.GRADIENT_BF16
        assert not torch.equal(ours, ours.bfloat16().float())  # a sum in bfloat16 would be one

    @pytest.mark.world_size(2)
    def test_a_rank_with_a_placeholder_only_takes_part(self, ranks, saved):
        prepared = prepare(saved("mixtral"), mesh=ranks.mesh())
        pack = build_pack([6], batch=BATCH)
        placeholder = {
            **build_pack([2], trained_share=0.0),
            "num_tokens": 0,
            **{f"batch_{k}": v for k, v in BATCH.items()},
        }
        loss = token_loss_sum(prepared, pack if ranks.is_main else placeholder)
        loss.backward()
        assert (loss.item() > 0) == ranks.is_main
        assert all(p.grad is not None for p in prepared.model.parameters())

    @pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
    def test_random_weights_do_not_depend_on_the_number_of_ranks(self, name, ranks, saved):
        directory = saved(name)
        assert_same_weights(draw(directory, mesh=ranks.mesh(), seed=5), draw(directory, seed=5))

    @pytest.mark.world_size(2)
    def test_a_growing_vocabulary_is_shared_out(self, ranks, saved):
        directory, tokenizer = saved("llama_tied"), build_tokenizer()
        assert_same_weights(load(directory, tokenizer, ranks.mesh()), load(directory, tokenizer))

    @pytest.mark.world_size(2)
    def test_frozen_parameters_get_no_gradient(self, ranks, saved):
        prepared = prepare(saved("llama"), mesh=ranks.mesh(), freeze_patterns=["embed", "mlp"])
        token_loss_sum(prepared, build_pack([7, 3])).backward()
        for name, parameter in prepared.model.named_parameters():
            assert (parameter.grad is None) == ("embed" in name or "mlp" in name), name

    def test_a_rank_reads_its_shards_and_no_more(self, ranks, saved):
        args = ModelArguments(model_name_or_path=str(saved("llama")))
        model = build_on_meta(read_config(args, find_model(args)))
        weights = CountingWeights(model, find_files(find_model(args)))
        prepare_model(model, args, ranks.mesh(), is_packed=True, weights=weights)
        assert weights.num_read == sum(p.to_local().numel() for p in model.parameters())
        assert weights.num_read < sum(p.numel() for p in model.parameters()) / ranks.world_size * UNEVEN


class CountingWeights(FileWeights):
    """Counts the elements read."""

    num_read = 0

    def read(self, name, region):
        tensor = super().read(name, region)
        self.num_read += tensor.numel()
        return tensor


UNEVEN = 1.1  # dimensions that the ranks do not divide
BATCH = {"num_tokens": 100, "num_loss_counted_tokens": 50, "num_samples": 9}


class TestLigerKernels:
    def test_a_cpu_is_refused(self, tmp_path):
        save_model(tmp_path)
        with pytest.raises(ModelError, match="use_liger_kernels: the kernels need a GPU, the device is cpu"):
            load(tmp_path, use_liger_kernels=True)

    @pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
    def test_the_missing_package_is_named(self):
        with pytest.raises(MissingPackageError, match=r"pip install 'reference-trainer\[gpu\]'"):
            liger_settings(tiny_llama(), "cuda")

    @pytest.mark.parametrize("name", ["llama", "gemma", "qwen3", "olmo2"])
    def test_kernels_are_chosen_by_what_they_compute_and_for_one_model_alone(self, name, monkeypatch):
        stand_in_for_liger(monkeypatch)
        model, other = build_model(name), build_model(name)
        settings = fused_settings(model, torch.device("cpu"))
        kinds = {type(each.owner).__name__ for each in settings}
        assert len(kinds) == 2  # its norm and its MLP
        pack = torch.arange(3, 12)[None]
        with torch.no_grad():
            expected = other(pack, use_cache=False).logits
            with Borrowing(settings).held():
                fused = model(pack, use_cache=False).logits
            assert torch.equal(model(pack, use_cache=False).logits, expected)
        torch.testing.assert_close(fused, expected, rtol=0, atol=tolerances.ISOLATION_FP32)
