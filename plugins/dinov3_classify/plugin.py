"""What this package offers."""

from __future__ import annotations

from dinov3_classify.components import COMPONENTS, PUBLISHED
from dinov3_classify.configs import KnnConfig, LogisticRegressionConfig
from dinov3_classify.configs_heads import ClassificationConfig, ProbesEvaluationConfig
from dinov3_classify.layouts import LAYOUTS
from dinov3_framework import Component, Layout, Published, hookimpl


@hookimpl
def dinov3_heads() -> list[Component]:
    return COMPONENTS


@hookimpl
def dinov3_evaluations() -> list[Component]:
    return [
        Component("knn", KnnConfig, "dinov3_classify.knn_evaluation:KnnEvaluation"),
        Component(
            "logistic_regression",
            LogisticRegressionConfig,
            "dinov3_classify.logistic_evaluation:LogisticRegressionEvaluation",
        ),
        Component(
            "linear_probes",
            ProbesEvaluationConfig,
            "dinov3_classify.probes_evaluation:ProbesEvaluation",
        ),
        Component(
            "classification",
            ClassificationConfig,
            "dinov3_classify.classification:ClassificationEvaluation",
        ),
    ]


@hookimpl
def dinov3_published() -> list[Published]:
    return PUBLISHED


@hookimpl
def dinov3_layouts() -> list[Layout]:
    return LAYOUTS
