"""Adapters of PEFT: they are trained, and what they adapt stays as it was, to the bit."""

from pathlib import Path

import pytest
import torch

from tests.fixtures.models import random_samples, tiny_llama
from trainer.config.arguments import TrainingArguments
from trainer.hf.trainer import Trainer

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # asked by PEFT


@pytest.mark.learns
def test_only_adapters_are_trained(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(tiny_llama(), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = [{"input_ids": ids, "labels": ids} for ids in random_samples([6] * 8)]
    args = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=1e-2, export_final=False)
    trainer = Trainer(model, args, train_dataset=samples, eval_dataset=samples)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert changed == adapters


@pytest.mark.world_size(1, 2)
def test_an_export_is_what_peft_loads(ranks) -> None:
    torch.manual_seed(0)  # of the adapters' first values, the same on all ranks
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], r=2
    )
    model = peft.get_peft_model(tiny_llama(), config)
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=3))
    samples = [{"input_ids": ids, "labels": ids} for ids in random_samples([6] * 8)]
    args = TrainingArguments(str(ranks.tmp_path / "run"), max_steps=2, learning_rate=1e-2, use_cpu=True)
    trainer = Trainer(model, args, train_dataset=samples, processing_class=None)
    trainer.train()
    folder = trainer.save_model(ranks.tmp_path / "out")
    ranks.barrier()
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "second"} <= names
    assert "model.safetensors" not in names
    again = peft.PeftModel.from_pretrained(tiny_llama(), folder)
    ids = random_samples([9])[0][None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(again.eval()(input_ids=ids, use_cache=False).logits, expected)
