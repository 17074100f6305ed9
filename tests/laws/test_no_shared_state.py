"""L16: two trainers, models or threads in one process do not know of each other; a model comes back as it was."""

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from tests.fixtures.datasets import labelled_rows
from tests.fixtures.models import build_model, build_pack, prepared_for_packs, tiny_llama
from tests.fixtures.runs import build_trainer, gradients_of, random_token_samples, weights_of
from trainer import Trainer, TrainingArguments
from trainer.model.loss import token_loss_sum

SAMPLES = random_token_samples((9, 3, 17, 5, 30, 2, 11, 7))
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "transformers' attention": {"attn_implementation": "sdpa"},
    "recomputed": {"gradient_checkpointing": True},
}


def attributes_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that can be seen on a model's parts and on its configuration, weights aside."""
    seen = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
        seen[name] = {key: repr(value) for key, value in plain.items() if key not in ("_modules", "training")}
    return seen | {"config": model.config.to_dict(), "attention": model.config._attn_implementation}


def rows_trained(folder: Path, model: Any, **options: Any) -> Any:
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        overwrite_output_dir=True,
        save_strategy="no",
        export_final=False,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, args, train_dataset=labelled_rows(8)).train().training_loss


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_model_comes_back_from_a_trainer_as_any_other(options: dict[str, Any], tmp_path: Path) -> None:
    model = build_model("llama_tied", pad_token_id=2)
    before = attributes_of(model)
    build_trainer(tmp_path, SAMPLES, model, max_steps=1, **options).train()
    assert attributes_of(model) == before


def test_a_second_trainer_of_a_model_with_other_options_is_right(tmp_path: Path) -> None:
    """Learning rate 0: all runs see the same weights."""
    alone, again = {}, {}
    model = tiny_llama()
    for name, options in [*OPTIONS.items(), *reversed(OPTIONS.items())]:
        given = {"learning_rate": 0.0, "max_steps": 2, "overwrite_output_dir": True, **options}
        alone[name] = build_trainer(tmp_path / "alone", SAMPLES, tiny_llama(), **given).train().training_loss
        again[name] = build_trainer(tmp_path / "again", SAMPLES, model, **given).train().training_loss
        assert again == alone
    assert len(set(alone.values())) > 1


def test_rows_after_packs_and_bfloat16_are_trained_as_if_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    build_trainer(tmp_path / "packs", SAMPLES, model, bf16=True, learning_rate=0.0).train()
    assert rows_trained(tmp_path / "again", model) == rows_trained(tmp_path / "alone", tiny_llama())


def test_two_threads_train_two_models_as_each_alone(tmp_path: Path) -> None:
    search = masking_utils.find_packed_sequence_indices
    names = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)

    def gradients(model: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        prepared = prepared_for_packs(model.train(), **options)
        with prepared.in_use():
            for step in range(4):
                token_loss_sum(prepared, build_pack([7, 4, 9], seed=step)).backward()
        return gradients_of(prepared.model)

    jobs = list(enumerate(OPTIONS.values()))
    expected = [gradients(tiny_llama(seed), options) for seed, options in jobs]
    models = [tiny_llama(seed) for seed, _ in jobs]  # drawn from torch's one global generator
    found: dict[int, dict[str, torch.Tensor]] = {}

    def note(seed: int, options: dict[str, Any]) -> None:
        found[seed] = gradients(models[seed], options)

    threads = [Thread(target=note, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, _ in jobs:
        assert found[seed].keys() == expected[seed].keys()
        assert all(torch.equal(found[seed][name], gradient) for name, gradient in expected[seed].items())
    assert masking_utils.find_packed_sequence_indices is search
    assert names == (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))


def test_a_trainer_leaves_no_trace_on_another_model(tmp_path: Path) -> None:
    other, before = tiny_llama(), tiny_llama()
    build_trainer(tmp_path, SAMPLES, tiny_llama(), max_steps=1).train()
    assert attributes_of(other) == attributes_of(before)
    assert all(torch.equal(value, weights_of(before)[name]) for name, value in weights_of(other).items())
