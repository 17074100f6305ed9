"""L5, model part: exported weights, loaded by transformers, give the logits of the model that was exported."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures.models import ATTENTION_ONLY, build_model, random_samples, save_model, tiny_llama
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import ModelArguments
from trainer.errors import CheckpointError
from trainer.model.build import load_model
from trainer.model.export import export_model
from trainer.model.fsdp import whole
from trainer.model.prepared import Prepared


def load(directory, mesh=None, **options):
    return load_model(ModelArguments(model_name_or_path=str(directory), **options), None, mesh, seed=0)


def reload(directory):
    """As anyone would, in the saved format; and what transformers says of the keys."""
    return AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)


@torch.no_grad()
def logits(model):
    return model(input_ids=random_samples([9])[0][None], use_cache=False).logits


def nudge(model):
    """Stand in for training: change every weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_logits_are_bit_equal(name, tmp_path):
    save_model(tmp_path / "start", name)
    prepared = load(tmp_path / "start")
    nudge(prepared.model)
    export_model(prepared, None, tmp_path / "end", torch.float32)
    again, report = reload(tmp_path / "end")
    assert torch.equal(logits(again), logits(prepared.model.eval()))
    assert not any(report.values())


def test_bfloat16_exports_give_the_logits_of_the_rounded_model(tmp_path):
    model = tiny_llama()
    export_model(Prepared.as_it_is(model), None, tmp_path / "out", torch.bfloat16)
    again, _ = reload(tmp_path / "out")
    assert again.dtype == again.config.dtype == torch.bfloat16
    for parameter in model.parameters():  # not model.bfloat16(): rotary tables stay float32
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(again), logits(model))


def test_the_format_is_the_one_in_which_the_model_was_stored(tmp_path):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "start")
    prepared = load(tmp_path / "start")
    export_model(prepared, None, tmp_path / "end")
    assert reload(tmp_path / "end")[0].dtype == torch.bfloat16
    assert {p.dtype for p in prepared.model.parameters()} == {torch.float32}


def test_tied_weights_are_stored_once(tmp_path):
    export_model(Prepared.as_it_is(build_model("llama_tied")), None, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  not a dict
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118


def test_names_are_the_hubs(tmp_path):
    export_model(Prepared.as_it_is(build_model("mixtral")), None, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in file.keys()  # noqa: SIM118


def test_files_are_cut_at_the_size_given(tmp_path):
    model = tiny_llama()
    export_model(Prepared.as_it_is(model), None, tmp_path / "out", max_shard_size="30KB")
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert torch.equal(logits(reload(tmp_path / "out")[0]), logits(model))


def test_tokenizer_and_generation_config_come_along(tmp_path):
    model = tiny_llama()
    model.generation_config.eos_token_id = [2, 7]
    export_model(Prepared.as_it_is(model), build_tokenizer(), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    assert reload(tmp_path / "out")[0].generation_config.eos_token_id == [2, 7]


def test_a_generation_config_that_transformers_would_not_save_comes_along(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature = 0.5  # without do_sample, as many models on the hub have it
    export_model(Prepared.as_it_is(model), None, tmp_path / "out")
    assert model.generation_config.temperature == 0.5
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5


def test_an_older_export_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    model = tiny_llama()
    export_model(Prepared.as_it_is(model), build_tokenizer(), tmp_path / "out")
    nudge(model)
    export_model(Prepared.as_it_is(model), None, tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out")[0]), logits(model))
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds something else than an export"):
        export_model(Prepared.as_it_is(tiny_llama()), None, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failed_write_leaves_the_older_export(tmp_path):
    model = tiny_llama()
    export_model(Prepared.as_it_is(model), None, tmp_path / "out")
    before = logits(reload(tmp_path / "out")[0])

    class BrokenTokenizer:
        def save_pretrained(self, directory):
            raise OSError(28, "No space left on device")

    nudge(model)
    with pytest.raises(CheckpointError, match="could not export to .*out: .*No space left on device"):
        export_model(Prepared.as_it_is(model), BrokenTokenizer(), tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out")[0]), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_a_sharded_model_exports_what_its_ranks_hold(name, ranks):
    start, end = ranks.tmp_path / "start", ranks.tmp_path / "end"
    if ranks.is_main:
        save_model(start, name)
    ranks.barrier()
    prepared = load(start, ranks.mesh())
    model = prepared.model
    nudge(model)
    export_model(prepared, None, end)
    again = reload(end)[0].state_dict()
    held = {key: whole(tensor) for key, tensor in model.state_dict().items()}
    assert [key for key in held if not torch.equal(held[key], again[key])] == []


@pytest.mark.world_size(2)
def test_all_ranks_learn_that_the_lead_could_not_write(ranks):
    if ranks.is_main:
        save_model(ranks.tmp_path / "start")
        (ranks.tmp_path / "file").write_text("in the way")
    ranks.barrier()
    prepared = load(ranks.tmp_path / "start", ranks.mesh())
    with pytest.raises(CheckpointError, match="could not export to"):
        export_model(prepared, None, ranks.tmp_path / "file" / "out")
