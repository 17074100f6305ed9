"""Seq2SeqTrainer: a Trainer of encoder-decoders whose predictions may be what the model generates.

Nothing of training differs. On several ranks all of them generate until the last has finished, because each holds a
part of the weights; how long that takes does not show in what any of them predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.trainer_utils import PredictionOutput

from trainer.config.arguments import Seq2SeqTrainingArguments
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer
from trainer.training.evaluate import PADDING
from trainer.training.model_task import ModelTask


class Seq2SeqTrainer(Trainer):
    """A Trainer that can predict what the model generates: see `predict_with_generate`.

    Takes what Trainer takes, with Seq2SeqTrainingArguments as `args`.

    Raises:
        UsageError: also where the generation config is not valid, before anything is trained.
    """

    args: Seq2SeqTrainingArguments

    def __init__(
        self, model: Any = None, args: Seq2SeqTrainingArguments | None = None, *given: Any, **options: Any
    ) -> None:
        args = args if args is not None else Seq2SeqTrainingArguments()
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise UsageError(f"args is a {type(args).__name__}: give trainer.Seq2SeqTrainingArguments")
        self.generation_config = None
        if args.generation_config is not None:
            self.generation_config = load_generation_config(args.generation_config)
        self._generation_options: dict[str, Any] = {}
        super().__init__(model, args, *given, **options)
        if args.predict_with_generate and not hasattr(self.model, "generate"):
            raise UsageError(f"predict_with_generate: a {type(self.model).__name__} has no method generate")

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **generation_options: Any,
    ) -> dict[str, float]:
        """Measure as `Trainer.evaluate` does; further options go to the model's `generate`."""
        self._generation_options = self._with_defaults(generation_options)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **generation_options: Any,
    ) -> PredictionOutput:
        """Predict as `Trainer.predict` does; further options go to the model's `generate`."""
        self._generation_options = self._with_defaults(generation_options)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation_options: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return loss, generated tokens and labels of one batch; without predict_with_generate what Trainer gives."""
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        loss = None if labels is None else super().prediction_step(model, inputs, True, ignore_keys)[0]
        options = {"synced_gpus": self.group.world_size > 1, **(generation_options or self._generation_options)}
        with self.compute_loss_context_manager():
            generated = self.model.generate(**_without_answers(inputs), **options)
        return loss, generated, labels

    @staticmethod
    def load_generation_config(gen_config_arg: Any) -> GenerationConfig:
        """Return a generation config that is valid, from any of the forms that the option of that name takes."""
        return load_generation_config(gen_config_arg)

    def padding_of(self, rows: str) -> int:
        """Return what shorter rows are filled with: of generated answers the padding token, which decoding skips."""
        if rows != "predictions" or not self.args.predict_with_generate:
            return PADDING
        for name in ("pad_token_id", "eos_token_id"):
            for source in (self.processing_class, self.model.generation_config, self.model.config):
                token = getattr(source, name, None)
                if isinstance(token, int):
                    return token
        return PADDING

    def _use_model(self, task: ModelTask, model: Any) -> None:
        super()._use_model(task, model)
        if self.generation_config is not None:
            model.generation_config = self.generation_config

    def _with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Add the length and the beams that the options of the run name."""
        given = {name: value for name, value in options.items() if value is not None}
        if "max_length" not in given and "max_new_tokens" not in given and self.args.generation_max_length is not None:
            given["max_length"] = self.args.generation_max_length
        if self.args.generation_num_beams is not None:
            given.setdefault("num_beams", self.args.generation_num_beams)
        return given


def load_generation_config(source: Any) -> GenerationConfig:
    """Return a generation config that is valid, from a GenerationConfig, its values, a file, a folder or a hub name.

    Raises:
        UsageError: it cannot be read, or contradicts itself.
    """
    try:
        config = _read_generation_config(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"generation_config = {source!r}: {error}") from error
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UsageError(
            f"generation_config = {source!r}: The loaded generation config instance is invalid: {error}"
        ) from error
    return config


def _read_generation_config(source: Any) -> GenerationConfig:
    if isinstance(source, GenerationConfig):
        return GenerationConfig.from_dict(source.to_dict())
    if isinstance(source, Mapping):
        return GenerationConfig.from_dict(dict(source))
    if Path(source).is_file():
        return GenerationConfig.from_pretrained(Path(source).parent, Path(source).name)
    return GenerationConfig.from_pretrained(source)


def _without_answers(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs without labels and the decoder inputs made from them: the model is to generate them."""
    dropped = {"labels"}
    given, labels = inputs.get("decoder_input_ids"), inputs.get("labels")
    if given is not None and labels is not None and given.shape == labels.shape:
        dropped |= {"decoder_input_ids", "decoder_attention_mask"}
    return {name: value for name, value in inputs.items() if name not in dropped}
