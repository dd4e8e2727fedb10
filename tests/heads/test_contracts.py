"""The contracts of heads, their data, their evaluations and their training, by the suites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads_support import SEGMENTATION, TUNED, recipe, registry

from dinov3_framework import ImagesConfig, Model
from dinov3_framework.testing import (
    ContractError,
    DatasetSuite,
    EvaluationSuite,
    HeadSuite,
    StreamDatasetSuite,
    TaskSuite,
    TrainUnitSuite,
)
from dinov3_framework.testing.toy_backbone import ToyBackbone


def config_of(kind: str, name: str, **values: Any) -> Any:
    return registry().config_of(kind, name, values)


class TestClassifier(HeadSuite):
    config = config_of("head", "toy_classifier", layers=[1, -1])
    registry = registry()


class TestSegmentation(HeadSuite):
    config = config_of("head", "toy_segmentation", layers=[0, 3])
    registry = registry()


class TestSquares(DatasetSuite):
    config = config_of("dataset", "squares", ragged=True, corrupt=[3])
    registry = registry()


class TestSquareStream(StreamDatasetSuite):
    config = config_of("dataset", "squares", stream=True, corrupt=[4, 11])
    registry = registry()


class TestScore(EvaluationSuite):
    config = config_of(
        "evaluation",
        "head_score",
        dataset=config_of("dataset", "squares", count=9, size=32),
        transform=config_of("transform", "joint", crop=32),
        batch_size=4,
    )
    registry = registry()
    images = ImagesConfig(channels=1, mean=(0.5,), std=(0.25,))

    @property
    def model(self) -> Model:  # type: ignore[override]
        backbone = ToyBackbone(1)
        head = self.known.build(
            config_of("head", "toy_classifier"),
            features=backbone.feature_info,
            targets=self.known.build(self.config.dataset, channels=1).targets,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone.init_weights()
            head.init_weights()
        return Model(backbone.eval(), self.images, head.eval(), 32)


class TestFrozen(TrainUnitSuite):
    config = recipe("observers={}")
    registry = registry()


class TestTuned(TrainUnitSuite):
    config = recipe("observers={}", *TUNED)
    registry = registry()


class TestTraining(TaskSuite):
    config = recipe(*SEGMENTATION)
    registry = registry()


@pytest.mark.parametrize(
    ("suite", "kind", "name", "options", "message"),
    [
        (HeadSuite, "head", "toy_classifier", {"layers": [4]}, "test_needs|IndexError"),
        (StreamDatasetSuite, "dataset", "squares", {"stream": True, "corrupt": [0]}, None),
    ],
)
def test_broken_promises_are_told(
    suite: Any, kind: str, name: str, options: dict[str, Any], message: str | None
) -> None:
    config = config_of(kind, name, **options)
    if message is None:
        suite.check(config, registry=registry())
        return
    with pytest.raises(ContractError, match=message):
        suite.check(config, registry=registry())
