"""Options of Seq2SeqTrainer: all of TrainingArguments, and how answers are generated when it evaluates and predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config.options import option
from trainer.config.training import TrainingArguments


@dataclass
class GenerationArguments:
    """Generated predictions."""

    predict_with_generate: bool = option(False, "Predict what the model generates, not its logits.")
    generation_max_length: int | None = option(
        None, "Longest answer in tokens, its first one included; by default that of the generation config.", above=0
    )
    generation_num_beams: int | None = option(None, "Beams; by default those of the generation config.", above=0)
    generation_config: str | Any = option(
        None, "A GenerationConfig, or folder, file or hub name of one, for the model."
    )


@dataclass
class Seq2SeqTrainingArguments(GenerationArguments, TrainingArguments):  # the last base's options come first
    """Every option of a run of Seq2SeqTrainer.

    Raises:
        UsageError: an option is unknown, of the wrong type, out of range, or has no effect beside the others.
    """

    def _contradictions(self) -> list[tuple[bool, str]]:
        settings = (self.generation_max_length, self.generation_num_beams)
        return [
            *super()._contradictions(),
            (
                not self.predict_with_generate and any(setting is not None for setting in settings),
                "generation_max_length and generation_num_beams have no effect without predict_with_generate",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Give every option as plain JSON values."""
        options = super().to_dict()
        if hasattr(self.generation_config, "to_dict"):
            options["generation_config"] = self.generation_config.to_dict()
        return options
