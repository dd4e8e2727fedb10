"""The evaluation of masks as several processes run it."""

from __future__ import annotations

from typing import Any

from dense_support import Drawn, pixel_model
from dinov3_segment.configs_evaluation import SegmentationConfig
from dinov3_segment.evaluation import SegmentationEvaluation

from dinov3_framework import Dataset, DatasetConfig, ImagesConfig
from dinov3_framework.data.dense_config import DenseInferenceConfig

SIZES = [(20, 30), (33, 17), (16, 16), (25, 40), (18, 19)]
SLIDE = DenseInferenceConfig(mode="slide", window=16, stride=11)


def prepared(dataset: Dataset, **options: Any) -> SegmentationEvaluation:
    values = {"target": "it", **options}
    evaluation = SegmentationEvaluation(SegmentationConfig(data=DatasetConfig(), **values))
    evaluation.prepare(lambda config, **runtime: dataset, ImagesConfig())
    return evaluation


def measure(**options: Any) -> dict[str, Any]:
    """Everything that the evaluation gives for a small model."""
    evaluation, model = prepared(Drawn(SIZES), inference=SLIDE, **options), pixel_model()
    metrics = evaluation.run(model)
    details = evaluation.details()
    return {
        "metrics": metrics,
        "intervals": details.intervals,
        "tables": details.tables,
        "confusion": details.arrays["confusion"].tolist(),
        "protocol": evaluation.protocol(model),
        "images": model.backbone.n_calls,
    }
