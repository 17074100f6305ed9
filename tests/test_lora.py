"""LoRA on packed data: what trains and what does not, formats, exports that PEFT loads, and what is refused."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures.liger import stand_in_for_liger
from tests.fixtures.models import build_model, build_pack, prepared_for_packs, random_samples, tiny_llama
from tests.fixtures.oracles import linear_schedule, mean_loss, relative_difference
from tests.fixtures.runs import build_trainer, chat_job, gradients_of, random_token_samples, step_lines, weights_of
from tests.fixtures.tolerances import LAYOUT_TRAJECTORY_FLOAT64, LOSS_BF16, LOSS_GRADIENT_FP32
from tests.laws.test_isolation import LENGTHS, lone_logits, packed_logits
from trainer.cli.main import main
from trainer.config.arguments import TrainingArguments
from trainer.data.order import epoch_order
from trainer.errors import CheckpointError, MissingPackageError, ModelError, UsageError
from trainer.hf.trainer import Trainer
from trainer.model.borrowing import Borrowing
from trainer.model.fsdp import compile_blocks
from trainer.model.liger import fused_settings
from trainer.model.lora import add_lora, base_fingerprint, lora_layers
from trainer.model.loss import token_loss_sum

peft = pytest.importorskip("peft", reason="peft is not installed")

SAMPLES = random_token_samples((9, 3, 17, 5, 30, 2, 11, 7, 24, 4, 13, 6))
VARIANTS: list[dict[str, Any]] = [{}, {"lora_use_dora": True, "lora_use_rslora": True, "lora_init": "orthogonal"}]


def lora_trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    return build_trainer(folder, SAMPLES, model, **{"lora_rank": 4, **options})


def adapted(model: Any = None, **settings: Any) -> Any:
    """A model that a script gave adapters with PEFT."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 2, **settings})
    return peft.get_peft_model(tiny_llama() if model is None else model, config)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=random_samples([9])[0][None], use_cache=False).logits


@pytest.mark.world_size(1, 2)
def test_a_run_is_the_run_by_hand(ranks: Any, tmp_path: Path) -> None:
    for number, options in enumerate(VARIANTS):
        losses, weights = ranks.once(partial(by_hand, **options))
        folder = tmp_path / str(number)
        trainer = lora_trainer(folder, tiny_llama().double(), max_tokens_per_rank=48, weight_decay=0.1, **options)
        trainer.train()
        if ranks.is_main:
            found = [line["loss"] for line in step_lines(folder)]
            assert found == pytest.approx(losses, rel=LAYOUT_TRAJECTORY_FLOAT64)
        assert relative_difference(weights_of(trainer.model), weights) < LAYOUT_TRAJECTORY_FLOAT64


def by_hand(**options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The run in plain torch and PEFT: one sample after another, AdamW, linear decay, clipping at 1."""
    model = add_lora(tiny_llama().double(), TrainingArguments(lora_rank=4, **options), seed=42)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in adapters if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in adapters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    losses = []
    for step, indices in enumerate(epoch_order(len(SAMPLES), 42, 0).reshape(3, 4), start=1):
        loss = mean_loss(model, [SAMPLES[i] for i in indices])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = linear_schedule(step, 1e-2, 0, 3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weights_of(model)


@pytest.mark.world_size(1, 2)
def test_adapters_move_and_nothing_else(ranks: Any, tmp_path: Path) -> None:
    trainer = lora_trainer(tmp_path, tiny_llama(tie_word_embeddings=True))
    before, digest = weights_of(trainer.model), base_fingerprint(trainer.model)
    trainer.train()
    moved = {name for name, value in weights_of(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert len(lora_layers(trainer.model)) == 14
    assert base_fingerprint(trainer.model) == digest == ranks.once(lambda: base_fingerprint(alone()))
    assert trainer.task.prepared.head is not None  # the logits never exist as a whole


def alone() -> Any:
    return add_lora(tiny_llama(tie_word_embeddings=True), TrainingArguments(lora_rank=4), seed=42)


def test_a_digest_shows_any_bit_of_the_base() -> None:
    model = alone()
    digests = {base_fingerprint(model)}
    for name in ("embed_tokens.weight", "layers.1.mlp.up_proj.base_layer.weight", "norm.weight"):
        weight = model.get_parameter(f"base_model.model.model.{name}").data
        weight.view(torch.int32)[-1] ^= 1
        digests.add(base_fingerprint(model))
    assert len(digests) == 4


def test_packed_samples_do_not_see_each_other(tmp_path: Path) -> None:
    trainer = lora_trainer(tmp_path, learning_rate=1e-1)
    trainer.train()
    prepared, samples = trainer.task.prepared, random_samples(LENGTHS)
    prepared.model.eval()
    for sample, logits in zip(samples, packed_logits(prepared, samples), strict=True):
        assert torch.equal(logits, lone_logits(prepared, sample))
    assert not torch.equal(logits_of(trainer.model), logits_of(tiny_llama()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tracing
def test_compiled_blocks_and_fused_kernels_give_adapters_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_liger(monkeypatch)
    args, found = TrainingArguments(lora_rank=4, lora_dropout=0.5), {}
    for kernel in ("none", "compiled", "kernels"):
        torch._dynamo.reset()
        prepared = prepared_for_packs(add_lora(tiny_llama(num_hidden_layers=1), args, seed=42))
        for layer in lora_layers(prepared.model).values():
            layer.lora_B["default"].weight.data.normal_(generator=torch.Generator().manual_seed(0))
        if kernel == "compiled":
            compile_blocks(prepared.model, backend="eager")  # as it is traced: inductor's C++ takes a minute
        settings = fused_settings(prepared.model, torch.device("cpu")) if kernel == "kernels" else []
        with Borrowing(settings).held(), prepared.in_use():
            torch.manual_seed(0)
            token_loss_sum(prepared, build_pack([7, 4, 9])).backward()
        assert bool(settings) == (kernel == "kernels")
        found[kernel] = gradients_of(prepared.model)
        assert {name for name in found[kernel] if "lora_A" in name}
    assert all(torch.equal(value, found["compiled"][name]) for name, value in found["none"].items())
    assert relative_difference(found["kernels"], found["none"]) < LOSS_GRADIENT_FP32


@pytest.mark.world_size(1, 2)
def test_the_base_keeps_its_format_where_the_run_computes_in_it(ranks: Any, tmp_path: Path) -> None:
    losses = []
    for is_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        folder = tmp_path / str(is_bf16)
        trainer = lora_trainer(folder, tiny_llama(dtype=torch.bfloat16), bf16=is_bf16, max_grad_norm=0)
        trainer.train()
        formats = {parameter.requires_grad: parameter.dtype for parameter in trainer.model.parameters()}
        assert formats == {True: torch.float32, False: expected}
        losses.append(trainer.state.train_metrics(1.0)["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_BF16)


def test_adapters_in_16_bits_train_in_32(tmp_path: Path) -> None:
    model = adapted(tiny_llama(dtype=torch.bfloat16)).to(torch.bfloat16)
    trainer = build_trainer(tmp_path, SAMPLES, model, bf16=True, gradient_checkpointing=True, learning_rate=1e-6)
    before = weights_of(model)
    trainer.train()
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".lora_" in name}  # by less than bfloat16 can hold


def model_job(folder: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run from files: a model with a tokenizer, and chats."""
    job = chat_job(folder)
    del job["model_config"]
    model = build_model("llama", vocab_size=320, max_position_embeddings=512, **changes)
    model.save_pretrained(folder / "model")
    return job | {"model_name_or_path": str(folder / "model"), "max_steps": 2, "learning_rate": 1e-2, "lora_rank": 4}


@pytest.mark.parametrize("options", VARIANTS)
def test_a_model_from_a_folder_trains_as_the_one_given(tmp_path: Path, options: dict[str, Any]) -> None:
    job = model_job(tmp_path) | options
    trainer = Trainer(args=TrainingArguments(str(tmp_path / "loaded"), export_final=False, **job))
    first = weights_of(trainer.model)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(job["model_name_or_path"])
    given = Trainer(model, TrainingArguments(str(tmp_path / "given"), export_final=False, **job))
    assert all(torch.equal(value, first[name]) for name, value in weights_of(given.model).items())
    given.train()
    found = weights_of(trainer.model)
    assert all(torch.equal(value, found[name]) for name, value in weights_of(given.model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_of_commands(tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, generate, evaluate and export: from the run's adapters and from its checkpoint."""
    job = model_job(tmp_path, dtype=dtype) | {"save_strategy": "steps", "save_steps": 2, "validation_split": 0.2}
    job |= {"eval_at_end": True, "save_total_limit": 1, "bf16": dtype == torch.bfloat16}
    job["tokenizer_name_or_path"] = str(tmp_path / "tokenizer")
    (tmp_path / "run.json").write_text(json.dumps(job | {"output_dir": str(tmp_path / "run")}))
    assert main(["train", str(tmp_path / "run.json"), "--use-cpu"]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    index = json.loads((checkpoint / "tensors.json").read_bytes())["tensors"]
    assert all(".lora_" in name for name in index)  # of weights and of the optimizer's state
    (export,) = (tmp_path / "run" / "hf_format").iterdir()
    names = {path.name for path in export.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    capsys.readouterr()
    losses = []
    for place in (tmp_path / "run", checkpoint):
        assert main(["generate", str(place), "--prompt", "hello", "--max-new-tokens", "3", "--use-cpu"]) == 0
        flags = ["--bf16"] if job["bf16"] else []
        assert main(["evaluate", str(place), "--json", "--use-cpu", *flags]) == 0
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"])
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert losses[0] == losses[1] == logged["eval_loss"]
    for source, target in ((export, "of_export"), (checkpoint, "of_checkpoint")):
        assert main(["export", str(source), str(tmp_path / target), "--merge"]) == 0
        assert main(["export", str(source), str(tmp_path / f"{target}_adapters")]) == 0
    merged = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("of_export", "of_checkpoint")]
    assert torch.equal(logits_of(merged[0]), logits_of(merged[1]))
    assert merged[0].dtype == dtype
    base = AutoModelForCausalLM.from_pretrained(job["model_name_or_path"], dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "of_checkpoint_adapters")
    expected, found = weights_of(loaded.merge_and_unload()), weights_of(merged[0])
    assert all(torch.equal(value, expected[name].to(dtype)) for name, value in found.items())
    assert main(["export", str(tmp_path / "of_export"), str(tmp_path / "again"), "--merge"]) == 2
    assert "--merge has no effect" in capsys.readouterr().err


def test_adapters_of_a_model_that_a_script_built_are_exported_by_that_script(tmp_path: Path) -> None:
    lora_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1).train()
    from trainer.training.saved_model import open_saved_model

    with pytest.raises(CheckpointError, match="holds adapters of a model that a script built: load it there"):
        open_saved_model(tmp_path / "run")


def test_a_checkpoint_is_of_the_base_that_was_trained_on(tmp_path: Path) -> None:
    job = model_job(tmp_path) | {"save_strategy": "steps", "save_steps": 2, "export_final": False}
    Trainer(args=TrainingArguments(str(tmp_path / "run"), **job)).train()
    build_model("llama", seed=1, vocab_size=320, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    from trainer.training.saved_model import open_saved_model

    with pytest.raises(CheckpointError, match="holds adapters of other weights than those found now in .*model"):
        open_saved_model(tmp_path / "run")
    trainer = Trainer(args=TrainingArguments(str(tmp_path / "run"), **job))
    with pytest.raises(UsageError, match="base_weights was '.*' when it was saved, '.*' now; set it back"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.world_size(1, 2)
def test_a_model_of_peft_trains_on_packs_and_is_exported_as_peft_loads_it(ranks: Any) -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=3))
    folder = ranks.tmp_path
    trainer = build_trainer(folder / "run", SAMPLES, model, save_strategy="steps", save_steps=3)
    before = weights_of(trainer.model)
    trainer.train()
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".default." in name}
    assert trainer.model is model
    trainer.save_model(folder / "out")
    ranks.barrier()
    twin = folder / "run" / "checkpoint-3"
    for place in (folder / "out", twin):
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), place)
        found, trained = weights_of(loaded), weights_of(model)
        assert all(torch.equal(value, trained[name]) for name, value in found.items() if ".default." in name)
        if ranks.world_size == 1:
            assert torch.equal(logits_of(loaded), logits_of(model))
    assert peft.PeftConfig.from_pretrained(folder / "out" / "second").r == 3


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_head_that_is_tied_and_adapted_is_merged_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **settings)
    trainer = build_trainer(tmp_path / "run", SAMPLES, model)
    trainer.train()
    trained = logits_of(model)
    trainer.save_model(tmp_path / "adapters")
    assert main(["export", str(tmp_path / "adapters"), str(tmp_path / "merged"), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), trained)
    embeddings, base = merged.get_input_embeddings().weight, tiny_llama(tie_word_embeddings=True)
    assert torch.equal(embeddings, base.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": None, "lora_alpha": 8}, "lora_alpha has no effect without lora_rank"),
        ({"osft": True, "osft_unfreeze_rank_ratio": 0.5}, "osft splits the matrices"),
        ({"lora_init": "pissa"}, "lora_init = 'pissa': allowed are default.*get_peft_model"),
        ({"lora_rank": 3, "lora_init": "orthogonal"}, "needs an even rank"),
        ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "galore_adamw projects gradients of whole"),
        ({"lora_target_modules": ["q_proj", "w_proj"]}, "'w_proj' is no module of this model.*q_proj"),
        ({"lora_target_modules": "w_.*"}, r"'w_\.\*' is no module"),
        ({"lora_target_modules": ["norm"]}, "PEFT cannot adapt"),
        ({"load_in_4bit": True}, "quantised weights cannot be trained or adapted; with lora_rank and bf16"),
        ({"use_peft": True}, "here it is 'lora_rank'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, ModelError), match=message):
        lora_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("qwen3_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("llama4", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_linear_layers_of_the_blocks_are_adapted(name: str, expected: set[str]) -> None:
    model = build_model(name)
    add_lora(model, TrainingArguments(lora_rank=2), seed=0)
    assert {layer.rpartition(".")[2] for layer in lora_layers(model)} == expected


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_models_that_cannot_be_adapted_are_refused(tmp_path: Path) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        lora_trainer(tmp_path, tied, lora_target_modules=["lm_head"])
    of_experts = TrainingArguments(lora_rank=2, lora_target_modules=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ModelError, match="stand for experts whose weights are one tensor"):
        add_lora(build_model("deepseek_v3"), of_experts, seed=0)
    with pytest.raises(ModelError, match="holds adapters of PEFT already; leave the option out"):
        lora_trainer(tmp_path, adapted())
    prompts = peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="kind PREFIX_TUNING cannot be trained on packed"):
        build_trainer(tmp_path, SAMPLES, prompts)
    rows = [{"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([3, 4])}]
    with pytest.raises(UsageError, match="lora_rank has no effect on a custom data set: wrap the model"):
        Trainer(tiny_llama(), TrainingArguments(str(tmp_path), lora_rank=2), train_dataset=rows)


def test_without_peft_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'reference-trainer\[lora\]'"):
        lora_trainer(tmp_path)
