"""What tests of the Trainer share, under the names that the testing guide gives; it lives in tests/fixtures."""

from tests.fixtures.datasets import DynamicShapesDataset, RegressionDataset, RepeatDataset, SampleIterableDataset
from tests.fixtures.regression import (
    BasicTextGenerationModel,
    RegressionModel,
    RegressionModelConfig,
    RegressionPreTrainedModel,
)

__all__ = [
    "BasicTextGenerationModel",
    "DynamicShapesDataset",
    "RegressionDataset",
    "RegressionModel",
    "RegressionModelConfig",
    "RegressionPreTrainedModel",
    "RepeatDataset",
    "SampleIterableDataset",
]
