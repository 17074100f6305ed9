"""docs/from-mini-trainer.md has a row for every flag, and names options that exist."""

import dataclasses
import re

from tests.shape.source import ROOT
from trainer.config.arguments import TrainingArguments
from trainer.config.foreign_names import OF_MINI_TRAINER
from trainer.mini_trainer import MiniTrainerFlags

TEXT = (ROOT / "docs" / "from-mini-trainer.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \|(?: `(\w+)`)? \|", TEXT, flags=re.M))


def test_every_flag_has_a_row() -> None:
    assert set(ROWS) == {field.name for field in dataclasses.fields(MiniTrainerFlags)} | set(OF_MINI_TRAINER)


def test_a_row_names_an_option_where_the_flag_is_supported() -> None:
    options = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {name for name, option in ROWS.items() if option not in options} == set(OF_MINI_TRAINER)
