"""L16: two trainers, models or threads in one process do not know of each other; a model comes back as it was."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from tests.fixtures.datasets import labelled_rows
from tests.fixtures.liger import stand_in_for_liger
from tests.fixtures.models import build_model, build_pack, prepared_for_packs, tiny_llama
from tests.fixtures.runs import build_trainer, gradients_of, random_token_samples, weights_of
from trainer import Trainer, TrainingArguments
from trainer.model.borrowing import Borrowing
from trainer.model.liger import fused_settings
from trainer.model.loss import token_loss_sum

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracing
T = TypeVar("T")
SAMPLES = random_token_samples((9, 3, 17, 5, 30, 2, 11, 7))
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "transformers' attention": {"attn_implementation": "sdpa"},
    "recomputed": {"gradient_checkpointing": True},
}
# Trainers of token data compile by torch's own compiler, which takes long, and refuse kernels that need a GPU.
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
OPTIONS_OF_MODELS: dict[str, dict[str, Any]] = {**OPTIONS, "compiled": COMPILED, "kernels": {}}


def attributes_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that can be seen on a model's parts and on its configuration, weights aside."""
    seen = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
        seen[name] = {key: repr(value) for key, value in plain.items() if key not in ("_modules", "training")}
    return seen | {"config": model.config.to_dict(), "attention": model.config._attn_implementation}


def rows_trained(folder: Path, model: Any, **options: Any) -> float:
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        overwrite_output_dir=True,
        save_strategy="no",
        export_final=False,
        max_steps=2,
        per_device_train_batch_size=4,
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
    for options in (COMPILED, {}):
        alone = rows_trained(tmp_path / "alone", tiny_llama(), learning_rate=0.0, **options)
        assert rows_trained(tmp_path / "again", model, learning_rate=0.0, **options) == alone


def gradients_of_packs(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Gradients of a few packs under the options of that name."""
    prepared = prepared_for_packs(model.train(), **OPTIONS_OF_MODELS[name])
    if name == "kernels":
        settings = fused_settings(model, torch.device("cpu"))
        assert settings
        prepared = replace(prepared, borrowing=Borrowing([*prepared.borrowing.settings, *settings]))
    with prepared.in_use():
        for step in range(4):
            token_loss_sum(prepared, build_pack([7, 4, 9], seed=step)).backward()
    found = gradients_of(prepared.model)
    model.zero_grad()
    return found


def in_threads(jobs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Run all jobs at the same time, each in a thread, and return what they returned."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        running = {name: threads.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in running.items()}


def are_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def test_threads_compute_as_each_alone_with_other_dtypes_attention_and_kernels(monkeypatch) -> None:
    stand_in_for_liger(monkeypatch)
    search = masking_utils.find_packed_sequence_indices
    names = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    cells = list(OPTIONS_OF_MODELS)
    expected = {name: gradients_of_packs(tiny_llama(seed), name) for seed, name in enumerate(cells)}
    models = [tiny_llama(seed) for seed in range(len(cells))]  # drawn from torch's one global generator
    jobs = {name: partial(gradients_of_packs, model, name) for model, name in zip(models, cells, strict=True)}
    found = in_threads(jobs)
    for name in cells:
        assert are_equal(found[name], expected[name]), name
    assert masking_utils.find_packed_sequence_indices is search
    assert names == (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))


def test_one_model_computes_in_turn_as_each_alone_with_kernels_and_without(monkeypatch) -> None:
    stand_in_for_liger(monkeypatch)
    cells = ["float32", "kernels", "compiled", "kernels", "bfloat16", "float32"]
    alone = {name: gradients_of_packs(tiny_llama(), name) for name in dict.fromkeys(cells)}
    assert not are_equal(alone["float32"], alone["bfloat16"])
    model = tiny_llama()
    for name in cells:
        assert are_equal(gradients_of_packs(model, name), alone[name]), name


def test_trainers_in_threads_train_as_each_alone(tmp_path: Path) -> None:
    def build(folder: str, seed: int, name: str) -> Trainer:
        options = {"max_steps": 2, "save_strategy": "no", **OPTIONS[name]}
        return build_trainer(tmp_path / folder / str(seed), SAMPLES, tiny_llama(seed), **options)

    def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
        trainer.train()
        return weights_of(trainer.model)

    expected = {name: weights(build("alone", seed, name)) for seed, name in enumerate(OPTIONS)}
    trainers = {name: build("threads", seed, name) for seed, name in enumerate(OPTIONS)}
    rows = partial(rows_trained, learning_rate=1e-2, **COMPILED)
    loss_of_rows = rows(tmp_path / "alone" / "rows", tiny_llama())
    jobs: dict[str, Callable[[], Any]] = {name: partial(weights, trainer) for name, trainer in trainers.items()}
    jobs["rows"] = partial(rows, tmp_path / "threads" / "rows", tiny_llama())
    found = in_threads(jobs)
    assert found.pop("rows") == loss_of_rows
    for name, values in expected.items():
        assert are_equal(found[name], values), name


def test_a_trainer_leaves_no_trace_on_another_model(tmp_path: Path) -> None:
    other, before = tiny_llama(), tiny_llama()
    build_trainer(tmp_path, SAMPLES, tiny_llama(), max_steps=1).train()
    assert attributes_of(other) == attributes_of(before)
    assert all(torch.equal(value, weights_of(before)[name]) for name, value in weights_of(other).items())
