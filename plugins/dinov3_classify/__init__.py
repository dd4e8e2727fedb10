"""Evaluations of a backbone's features as classifiers."""

from __future__ import annotations

from dinov3_classify.configs import KnnConfig, LogisticRegressionConfig
from dinov3_framework import Component, hookimpl

__all__ = ["KnnConfig", "LogisticRegressionConfig"]


@hookimpl
def dinov3_evaluations() -> list[Component]:
    return [
        Component("knn", KnnConfig, "dinov3_classify.knn_evaluation:KnnEvaluation"),
        Component(
            "logistic_regression",
            LogisticRegressionConfig,
            "dinov3_classify.logistic_evaluation:LogisticRegressionEvaluation",
        ),
    ]
