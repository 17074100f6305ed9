"""The Trainer with models, losses, steps, optimizers and schedules of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.fixtures.models import tiny_llama
from tests.fixtures.tokenizers import build_tokenizer
from tests.fixtures.tolerances import (
    REGRESSION_FP32,
)
from tests.trainer.trainer_test_utils import (
    PLAIN,
    RegressionDataset,
    RegressionModel,
    RegressionPreTrainedModel,
    get_regression_trainer,
    labelled_rows,
    line_by_hand,
    line_of,
    logged,
    points_of_steps,
)
from trainer.config.arguments import TrainingArguments
from trainer.errors import ModelError, UsageError
from trainer.hf.trainer import Trainer


class TestModels:
    def test_the_loss_is_found_by_name_or_first(self, tmp_path: Path) -> None:
        class Named(RegressionModel):
            def forward(self, input_x: Any, labels: Any = None, **_: Any) -> Any:
                loss, y = super().forward(input_x, labels)
                return {"y": y, "loss": loss}

        class Nameless(Named):
            def forward(self, input_x: Any, labels: Any = None, **_: Any) -> Any:
                return {"y": super().forward(input_x, labels)["y"]}

        first, named = (
            get_regression_trainer(output_dir=tmp_path / kind.__name__, model=kind(), **PLAIN)
            for kind in (RegressionModel, Named)
        )
        first.train()
        named.train()
        assert line_of(first) == line_of(named)
        with pytest.raises(ModelError, match="gave no loss, only y, for the inputs"):
            get_regression_trainer(output_dir=tmp_path / "none", model=Nameless()).train()

    def test_model_init_builds_anew_for_each_run(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return RegressionModel(a=torch.rand(()).item())

        trainer = get_regression_trainer(output_dir=tmp_path, model_init=build, max_steps=2)
        starts = [trainer.model.a.item()]
        trainer.train()
        first = line_of(trainer)
        trainer.train()
        assert line_of(trainer) == first
        assert starts[0] != first[0]

    def test_a_model_is_given_in_one_way(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="give either model or model_init"):
            Trainer(RegressionModel(), TrainingArguments(str(tmp_path)), model_init=RegressionModel)
        optimizer = torch.optim.SGD(RegressionModel().parameters())
        with pytest.raises(UsageError, match="model_init builds it anew for each train"):
            get_regression_trainer(output_dir=tmp_path, model_init=RegressionModel, optimizers=(optimizer, None))
        with pytest.raises(ModelError, match="model is a str: give a torch.nn.Module"):
            Trainer("model", TrainingArguments(str(tmp_path)), train_dataset=RegressionDataset())  # type: ignore[arg-type]

    def test_a_loss_function_takes_outputs_labels_and_their_number(self, tmp_path: Path) -> None:
        def squared_error(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            return ((outputs[0] - labels) ** 2).sum() / num_items_in_batch

        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, **PLAIN}
        own = get_regression_trainer(output_dir=tmp_path / "own", **options)
        by_function = get_regression_trainer(output_dir=tmp_path / "given", compute_loss_func=squared_error, **options)
        own.train()
        by_function.train()
        assert line_of(by_function) == pytest.approx(line_of(own), rel=REGRESSION_FP32)

    def test_overrides_are_used(self, tmp_path: Path) -> None:
        class Doubled(Trainer):
            def compute_loss(self, *given: Any, **options: Any) -> Any:
                return 2 * super().compute_loss(*given, **options)

        class ByHand(Trainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
                loss = 2 * model(**inputs)[0]
                self.accelerator.backward(loss)
                return loss.detach()

            def log(self, logs: dict[str, float], start_time: Any = None) -> None:
                super().log({**logs, "mine": 1.0}, start_time)

        doubled, by_hand = (
            get_regression_trainer(output_dir=tmp_path / kind.__name__, trainer_class=kind, logging_steps=1, **PLAIN)
            for kind in (Doubled, ByHand)
        )
        doubled.train()
        by_hand.train()
        assert line_of(by_hand) == line_of(doubled)
        assert logged(by_hand, "mine") == [1.0] * 24
        with pytest.raises(AttributeError, match=r"accelerator\.autocast: this Trainer works without accelerate"):
            by_hand.accelerator.autocast  # noqa: B018
        with pytest.raises(AttributeError, match=r"accelerator\.prepare: .*; leave it out"):
            by_hand.accelerator.prepare(by_hand.model)

    @pytest.mark.world_size(1, 2)
    def test_an_own_step_is_averaged_over_ranks(self, ranks) -> None:
        class ByHand(Trainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
                loss = model(**inputs)[0]
                self.accelerator.backward(loss)
                return loss.detach()

        options = {"per_device_train_batch_size": 8 // ranks.world_size, "logging_steps": 1, "num_train_epochs": 1}
        trainer = get_regression_trainer(output_dir=ranks.tmp_path / "run", trainer_class=ByHand, **options, **PLAIN)
        trainer.train()
        losses, line = line_by_hand(points_of_steps(64, 8, 1), learning_rate=0.1)
        assert logged(trainer) == pytest.approx(losses, rel=REGRESSION_FP32)
        assert line_of(trainer) == pytest.approx(line, rel=REGRESSION_FP32)

    def test_own_makers_of_optimizer_and_schedule_are_used(self, tmp_path: Path) -> None:
        class Own(Trainer):
            def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
                self.optimizer = self.optimizer or torch.optim.SGD(self.model.parameters(), lr=1.0)
                return self.optimizer

            def create_scheduler(self, num_training_steps: int | None, optimizer: Any = None) -> Any:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.create_optimizer(), lambda step: 0.1)
                self.planned = num_training_steps
                return self.lr_scheduler

        own = get_regression_trainer(output_dir=tmp_path / "own", trainer_class=Own, max_grad_norm=0.0)
        named = get_regression_trainer(output_dir=tmp_path / "named", **PLAIN)
        own.train()
        named.train()
        assert own.planned == 24
        assert line_of(own) == pytest.approx(line_of(named), rel=REGRESSION_FP32)

    def test_keys_and_values_are_not_kept(self, tmp_path: Path) -> None:
        trainer = Trainer(tiny_llama(), TrainingArguments(str(tmp_path)), eval_dataset=labelled_rows(2))
        predictions = trainer.predict(labelled_rows(2), ignore_keys=[]).predictions
        assert predictions.shape[0] == 2

    def test_optimizer_and_schedule_may_be_given(self, tmp_path: Path) -> None:
        model = RegressionModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
        given = get_regression_trainer(
            output_dir=tmp_path / "given", model=model, optimizers=(optimizer, schedule), max_grad_norm=0.0
        )
        named = get_regression_trainer(output_dir=tmp_path / "named", **PLAIN)
        assert (given.optimizer, given.lr_scheduler) == (optimizer, schedule)
        given.train()
        named.train()
        assert line_of(given) == pytest.approx(line_of(named), rel=REGRESSION_FP32)

    def test_a_maker_of_optimizers_is_given_the_model(self, tmp_path: Path) -> None:
        class Maker:
            def __call__(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
                return torch.optim.SGD(model.parameters(), lr=lr)

        made = get_regression_trainer(
            output_dir=tmp_path / "made", **{**PLAIN, "optimizer_cls_and_kwargs": (Maker, {"lr": 0.1})}
        )
        named = get_regression_trainer(output_dir=tmp_path / "named", **PLAIN)
        made.train()
        named.train()
        assert line_of(made) == line_of(named)

    @pytest.mark.world_size(2)
    def test_an_optimizer_of_parameters_that_were_sharded_is_refused(self, ranks) -> None:
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        args = TrainingArguments(str(ranks.tmp_path / "run"), max_steps=1)
        trainer = Trainer(model, args, train_dataset=labelled_rows(2), optimizers=(optimizer, None))
        with pytest.raises(UsageError, match="parameters that are not the model's"):
            trainer.train()

    def test_the_optimizer_of_the_options_can_be_asked_for(self) -> None:
        args = TrainingArguments(optim="adamw_torch", adam_beta1=0.8, learning_rate=0.25)
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        assert kind is torch.optim.AdamW
        assert (settings["lr"], settings["betas"]) == (0.25, (0.8, 0.999))
        kind([nn.Parameter(torch.zeros(1))], **settings)

    def test_the_collators_tokenizer_is_exported(self, tmp_path: Path) -> None:
        class Collator:
            tokenizer = build_tokenizer()

            def __call__(self, samples: Any) -> Any:
                return transformers.default_data_collator(samples)

        trainer = get_regression_trainer(output_dir=tmp_path, data_collator=Collator())
        folder = trainer.save_model()
        assert len(transformers.AutoTokenizer.from_pretrained(folder)) == len(Collator.tokenizer)

    def test_frozen_parameters_stay(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, b=0.5, freeze_patterns=["^b$"])
        assert trainer.get_num_trainable_parameters() == 1
        trainer.train()
        assert trainer.model.b.item() == 0.5
        assert trainer.model.a.item() != 0

    def test_arguments_know_the_device(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, use_cpu=True)
        assert (trainer.args.device, trainer.args.n_gpu) == (trainer.model.a.device, 0)

    def test_optimizers_can_be_asked(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, learning_rate=0.25)
        with pytest.raises(ValueError, match="optimizer is None"):
            trainer.get_learning_rates()
        trainer.create_optimizer_and_scheduler(10)
        assert set(trainer.get_learning_rates()) == {0.25}
        group = trainer.get_optimizer_group(trainer.model.a)
        assert any(held is trainer.model.a for held in group["params"])
        assert sum(len(params) for params in trainer.get_optimizer_group()) == 2

    @pytest.mark.world_size(1, 2)
    def test_a_plain_module_is_exported_as_weights(self, ranks) -> None:
        from safetensors.torch import load_file

        trainer = get_regression_trainer(
            output_dir=ranks.tmp_path / "run", pretrained=False, export_final=True, max_steps=1
        )
        trainer.train()
        (folder,) = (ranks.tmp_path / "run" / "hf_format").iterdir()
        weights = load_file(folder / "model.safetensors")
        assert (weights["a"].item(), weights["b"].item()) == line_of(trainer)

    def test_a_model_may_be_saved_among_what_the_run_writes(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, max_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path))
        trainer.save_model(str(tmp_path))
        saved = RegressionPreTrainedModel.from_pretrained(tmp_path)
        assert (saved.a.item(), saved.b.item()) == line_of(trainer)
        assert (tmp_path / "metrics.jsonl").is_file()
